"""The policy `paper` where only prompts run: Algorithm 1, grouped prefill.

Groups of one model each stand in line; the front one's requests run one at a time.
"""

from collections.abc import Iterable

from aegaeon.scheduler.groups import Entry, Group
from aegaeon.scheduler.paper_device import Batch, PaperDevice
from aegaeon.types import Decode, ModelId, Prefill


class PaperPrefill(PaperDevice):
    """A line of groups. What a group has taken counts to its end, so that nobody is passed over
    by more than a group."""

    @property
    def load(self) -> float:
        """The seconds that the line takes, with its switches."""
        if self._rules.load_counts_groups:
            return len(self._batches)
        seconds = 0.0
        model = self._current
        for batch in self._batches:
            if batch.model != model:
                model = batch.model
                seconds += self._load_s[model]
            cost = self._costs[model]
            seconds += sum(entry.prefill_s(cost) for entry in self._waiting(batch))
        return seconds

    def joins(self, model: ModelId) -> bool:
        """Whether a group of `model` has room."""
        return self._with_room(model) is not None

    def _with_room(self, model: ModelId) -> Batch | None:
        for batch in self._batches:
            if batch.model == model and batch.size < self._rules.max_group:
                return batch
        return None

    def _entered(self, group: Group, entry: Entry, now: float) -> None:  # noqa: ARG002
        batch = self._with_room(group.model)
        if batch is None:
            batch = Batch(group.model)
            self._batches.append(batch)
        batch.members[entry.id] = None
        batch.size += 1

    def _choose(self, now: float) -> Group | None:
        self._turn = next((batch for batch in self._batches if self._is_able(batch, now)), None)
        if self._turn is None or not self._is_ready(self._turn.model):
            return None
        self._reason = "front_group"
        return self._groups[self._turn.model]

    def _step(self, group: Group, now: float) -> Prefill | None:
        assert self._turn is not None
        if self._is_short(self._turn, now):
            self._reason = "no_room_for_kv"
            return None
        return Prefill(group.model, (self._waiting(self._turn)[0].id,))

    def _stepped(self, group: Group, action: Prefill | Decode, now: float) -> None:  # noqa: ARG002
        self._changed(group)

    def _next_tokens(self, batch: Batch) -> int:
        waiting = self._waiting(batch)
        return waiting[0].tokens + 1 if waiting else 0

    def _upcoming(self, now: float) -> Iterable[Batch]:
        return [b for b in self._batches if b is not self._turn and self._is_able(b, now)]

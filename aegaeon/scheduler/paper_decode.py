"""The policy `paper` where tokens are decoded: Algorithm 2, weighted turns in rounds.

Where prompts run, too (the role `colocated`, or after a sequence has lost its KV), a turn first
prefills what waits, one request at a time and at most a group's worth; then it decodes.
"""

from collections import deque
from collections.abc import Iterable
from itertools import chain

from aegaeon.metrics import Target
from aegaeon.scheduler.cost import Costs
from aegaeon.scheduler.groups import Entry, Group
from aegaeon.scheduler.ledger import Limits
from aegaeon.scheduler.paper import PaperRules, quotas
from aegaeon.scheduler.paper_device import Batch, PaperDevice
from aegaeon.scheduler.residency import Residency
from aegaeon.types import Decode, ModelId, Prefill, Role, Stretch


class PaperDecode(PaperDevice):
    """Rounds of turns. A batch is as large as its KV allows; a model may have several."""

    def __init__(
        self,
        residency: Residency,
        costs: Costs,
        limits: Limits,
        role: Role,
        target: Target,
        rules: PaperRules = PaperRules(),  # noqa: B008  frozen
    ) -> None:
        """As PaperDevice."""
        super().__init__(residency, costs, limits, role, target, rules)
        self._round: deque[Batch] = deque()  # whose turns are still to come in it
        self._lasts_s = 0.0  # what a turn of the round makes, at the target's pace

    @property
    def load(self) -> float:
        """The number of batches."""
        return len(self._batches)

    def joins(self, model: ModelId) -> bool:
        """Whether a batch of `model` has room for one more like its others."""
        return self._with_room(model, None) is not None

    # Batches

    def _with_room(self, model: ModelId, tokens: int | None) -> Batch | None:
        for batch in self._batches:
            if batch.model == model and self._has_room(batch, tokens):
                return batch
        return None

    def _has_room(self, batch: Batch, tokens: int | None) -> bool:
        """Whether KV of `tokens`, None for what others have on the average, fits into `batch`."""
        count = len(batch.members)
        if count >= self._limits.max_batch:
            return False
        if not self._residency.kv_bytes(batch.model, 1):
            return True
        held = self._context(batch)
        total = held + (held // count if tokens is None else tokens)
        return self._residency.kv_bytes(batch.model, total) <= self._most_kv_bytes(batch.model)

    def _context(self, batch: Batch) -> int:
        return sum(e.tokens for e in chain(self._running(batch), self._waiting(batch)))

    def _most_kv_bytes(self, model: ModelId) -> int:
        """What a batch of `model` may hold: half of what two models leave free."""
        residency = self._residency
        weights = residency.bytes_of(model) + max(map(residency.bytes_of, self._models))
        free = residency.budget_bytes - weights - residency.kv_margin_bytes
        return max(free, residency.budget_bytes - residency.bytes_of(model)) // 2

    def _entered(self, group: Group, entry: Entry, now: float) -> None:  # noqa: ARG002
        batch = self._with_room(group.model, entry.tokens)
        if batch is None:
            batch = Batch(group.model)
            self._batches.append(batch)
            if self._rules.joins_round and (self._round or self._turn is not None):
                step_s = self._costs[batch.model].decode_s(entry.tokens, 1)
                batch.quota_s = self._lasts_s * step_s / self._target.tbt_s
                self._round.append(batch)
        batch.members[entry.id] = None

    # Turns

    def _choose(self, now: float) -> Group | None:
        if self._turn is None or self._is_over(self._turn, now):
            self._turn = self._next_turn(now)
        turn = self._turn
        if turn is None or not self._is_ready(turn.model):
            return None
        group = self._groups[turn.model]
        has_prompt = self._next_prompt(turn) is not None and self._may_prefill(group, now)
        if not has_prompt and not self._here(turn):
            self._reason = "kv_not_here"
            return None
        self._reason = "turn"
        return group

    def _is_over(self, turn: Batch, now: float) -> bool:
        if not self._is_able(turn, now):
            return True
        if not self._running(turn) and self._next_prompt(turn) is None:
            return True  # it has prefilled its share
        return turn.ends_s is not None and now >= turn.ends_s

    def _next_turn(self, now: float) -> Batch | None:
        """The next one of the round that is able to do anything, or the first of a new round."""
        while self._round and not self._is_able(self._round[0], now):
            self._round.popleft()
        if not self._round:
            self._begin_round(now)
        if not self._round:
            return None
        turn = self._round.popleft()
        turn.ends_s = None
        turn.prefilled = 0
        return turn

    def _begin_round(self, now: float) -> None:
        batches = [batch for batch in self._in_order() if self._is_able(batch, now)]
        if not batches:
            return
        step_s = [
            self._costs[batch.model].decode_s(self._context(batch), len(batch.members))
            for batch in batches
        ]
        switch_s = sum(self._load_s[model] for model in {batch.model for batch in batches})
        shares = quotas(step_s, switch_s, self._target.tbt_s, self._rules)
        for batch, quota_s in zip(batches, shares, strict=True):
            batch.quota_s = quota_s
        self._lasts_s = shares[0] * self._target.tbt_s / step_s[0]
        self._round.extend(batches)

    def _in_order(self) -> list[Batch]:
        """All batches in the order of a round: those of a model beside each other."""
        by_model: dict[ModelId, list[Batch]] = {}
        for batch in self._batches:
            by_model.setdefault(batch.model, []).append(batch)
        return list(chain.from_iterable(by_model.values()))

    def _upcoming(self, now: float) -> Iterable[Batch]:
        later = (batch for batch in self._in_order() if batch not in self._round)
        sequence = chain(tuple(self._round), later)
        return [b for b in sequence if b is not self._turn and b.members and self._is_able(b, now)]

    # Steps

    def _here(self, turn: Batch) -> list[Entry]:
        return [entry for entry in self._running(turn) if entry.is_here]

    def _step(self, group: Group, now: float) -> Prefill | Decode | None:
        turn = self._turn
        assert turn is not None
        if self._is_short(turn, now):
            self._reason = "no_room_for_kv"
            return None
        here = self._here(turn)
        prompt = self._next_prompt(turn)
        has_room = not here or self._short_bytes(turn) <= 0
        if prompt is not None and has_room and self._may_prefill(group, now):
            return Prefill(group.model, (prompt.id,))
        requests = [entry.id for entry in here][: self._limits.max_batch]
        while len(requests) > 1 and not self._steps_that_fit(group, len(requests)):
            self._put_back(group, (requests.pop(),))
            self._changed(group)
        return Decode(group.model, tuple(requests), self._stretch(turn, group, len(requests)))

    def _next_prompt(self, turn: Batch) -> Entry | None:
        if turn.prefilled >= self._rules.max_group:
            return None
        return next(iter(self._waiting(turn)), None)

    def _next_tokens(self, batch: Batch) -> int:
        prompt = self._next_prompt(batch)
        return max(len(self._here(batch)), 0 if prompt is None else prompt.tokens + 1)

    def _stretch(self, turn: Batch, group: Group, requests: int) -> Stretch:
        """To the turn's end, which the end of its first step sets."""
        if turn.ends_s is None:
            return Stretch()
        steps = self._steps_that_fit(group, requests)
        return Stretch(max(1, steps), until_s=turn.ends_s)

    def _stepped(self, group: Group, action: Prefill | Decode, now: float) -> None:
        turn = self._turn
        if turn is None or turn.model != group.model:
            return
        if isinstance(action, Prefill):
            turn.prefilled += len(action.requests)
        elif turn.ends_s is None:
            turn.ends_s = now + turn.quota_s

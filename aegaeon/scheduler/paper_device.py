"""What a device under the policy `paper` does with its memory: this turn's model and the next's.

When a turn is over its weights go, and its KV; they come back for its next one.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from aegaeon.metrics import Target
from aegaeon.scheduler.cost import Costs
from aegaeon.scheduler.device import DeviceScheduler
from aegaeon.scheduler.groups import Entry, Group
from aegaeon.scheduler.ledger import Limits
from aegaeon.scheduler.paper import PaperRules
from aegaeon.scheduler.residency import Residency
from aegaeon.types import Load, ModelId, RequestId, Role


@dataclass(slots=True, eq=False)
class Batch:
    """Requests of one model that have turns together."""

    model: ModelId
    members: dict[RequestId, None] = field(default_factory=dict)  # that wait or run
    size: int = 0  # with those that have gone
    quota_s: float = 0.0
    ends_s: float | None = None  # its turn; None until the first step of it has
    prefilled: int = 0  # in this turn


class PaperDevice(DeviceScheduler[Group]):
    """Batches in turn, with the next one's model prefetched."""

    def __init__(
        self,
        residency: Residency,
        costs: Costs,
        limits: Limits,
        role: Role,
        target: Target,
        rules: PaperRules = PaperRules(),  # noqa: B008  frozen
    ) -> None:
        """`costs.models` are those served. Nothing is resident yet."""
        super().__init__(residency, tuple(costs.models), limits, role)
        self._costs = costs.models
        self._load_s_of = costs.load_s
        self._load_s = {model: costs.load_s(cost) for model, cost in costs.models.items()}
        self._target = target
        self._rules = rules
        self._batches: list[Batch] = []
        self._turn: Batch | None = None
        self._worn: set[ModelId] = set()  # had their turn: loaded again before the next one

    def begin_model(self, model: ModelId, weight_bytes: int) -> None:
        super().begin_model(model, weight_bytes)
        self._load_s[model] = self._load_s_of(self._costs[model])

    def end_model(self, model: ModelId) -> bool:
        has_ended = super().end_model(model)
        if has_ended:
            self._load_s.pop(model, None)
            self._worn.discard(model)
        return has_ended

    @abstractmethod
    def _upcoming(self, now: float) -> Iterable[Batch]:
        """Return whose turns are next, in order."""

    @abstractmethod
    def _next_tokens(self, batch: Batch) -> int:
        """Return how many tokens of KV the next step of `batch` adds."""

    def _new_group(self, model: ModelId) -> Group:
        return Group(model)

    # Batches

    def _running(self, batch: Batch) -> list[Entry]:
        running = self._groups[batch.model].running
        return [running[request] for request in batch.members if request in running]

    def _waiting(self, batch: Batch) -> list[Entry]:
        waiting = self._groups[batch.model].waiting
        if not waiting:
            return []
        return [waiting[request] for request in batch.members if request in waiting]

    def _changed(self, group: Group) -> None:
        """Let go what has ended or left."""
        for batch in [one for one in self._batches if one.model == group.model]:
            gone = [r for r in batch.members if r not in group.waiting and r not in group.running]
            for request in gone:
                del batch.members[request]
            if not batch.members:
                self._remove(batch)

    def _remove(self, batch: Batch) -> None:
        self._batches.remove(batch)
        if self._turn is batch:
            self._turn = None

    def _is_able(self, batch: Batch, now: float) -> bool:
        """Whether `batch` could make progress, now or once it is loaded."""
        group = self._groups[batch.model]
        is_coming = self._is_ready(batch.model) or self._residency.loading == batch.model
        if not is_coming and group.load_at_s > now:
            return False
        if group.running and not group.running.keys().isdisjoint(batch.members):
            return True
        return bool(self._waiting(batch)) and self._may_prefill(group, now)

    def _may_prefill(self, group: Group, now: float) -> bool:
        has_room = len(group.running) < self._limits.max_running
        return has_room and self._kv.may_prefill(group, now)

    # Memory

    def _is_ready(self, model: ModelId) -> bool:
        return model not in self._worn and self._residency.is_resident(model)

    def _turn_ended(self, group: Group) -> None:
        if not self._rules.keeps_resident:
            self._worn.add(group.model)

    def _has_loaded(self, group: Group, took_s: float, is_displacing: bool) -> None:  # noqa: ARG002
        self._worn.discard(group.model)

    def _pick_load(self, now: float) -> Load | None:
        """Room for what computes, then its KV, then the next model and its KV."""
        turn = self._turn
        if turn is not None and self._short_bytes(turn) > 0:
            load = self._find_relief(turn, now)
            if load is not None:
                self._reason = "room_for_kv"
                return load
        first = None
        for batch in (*(() if turn is None else (turn,)), *self._upcoming(now)):
            first = batch.model if first is None else first
            load = self._find_load(batch, now)
            if load is not None:
                self._reason = "this_turn" if batch is turn else "next_turn"
                return load
            if batch.model != first:
                break
        return None

    def _find_load(self, batch: Batch, now: float) -> Load | None:
        """What of `batch` is not here, and who makes room for it."""
        residency, model = self._residency, batch.model
        is_absent = not self._is_ready(model)
        running = self._running(batch) if residency.kv_bytes(model, 1) else []
        bring = [entry for entry in running if not entry.is_here]
        if model in self._worn and len(bring) < len(running) and self._computes(but=batch):
            return self._move_out(entry for entry in running if entry.is_here)
        if not bring and (not is_absent or self._groups[model].load_at_s > now):
            return None
        need = sum(map(self._kv_bytes, bring)) + self._prompt_bytes(batch)
        worn = (model,) if is_absent and residency.is_resident(model) else ()
        if is_absent and not worn:
            need += residency.bytes_of(model)
        if batch is not self._turn:
            need += residency.kv_margin_bytes
        evict, offload, freed = self._make_room(batch, need - residency.free_bytes, now)
        lack = need - residency.free_bytes - freed
        while lack > 0 and bring and not (batch is self._turn and len(bring) == 1):
            lack -= self._kv_bytes(bring.pop())
        if (lack > 0 and batch is not self._turn) or not (is_absent or bring):
            return None
        return Load(model, evict + worn, _ids(offload), _ids(bring))

    def _computes(self, *, but: Batch) -> bool:
        """Whether the turn is that of a batch with weights, and not `but`."""
        turn = self._turn
        return turn is not None and turn is not but and self._is_ready(turn.model)

    def _move_out(self, entries: Iterable[Entry]) -> Load:
        """Their turn is over, so their KV goes, though their next one may be soon."""
        assert self._turn is not None
        return Load(self._turn.model, offload=_ids(entries))

    def _make_room(
        self, batch: Batch, missing_bytes: int, now: float
    ) -> tuple[tuple[ModelId, ...], list[Entry], int]:
        """Return weights to drop and KV to move out for `batch`, and the bytes that this frees.

        All that is neither of this turn nor `batch`; of it, with `keeps_resident`, what must go,
        that first which is needed last.
        """
        kept = {batch, self._turn}
        models = {one.model for one in kept if one is not None}
        if self._in_flight is not None:
            models.add(self._in_flight.model)
        is_all = not self._rules.keeps_resident
        order = self._last_first(now)
        evict: list[ModelId] = []
        offload: list[Entry] = []
        freed = 0
        for model in self._by_need(order):
            if model not in models and (is_all or freed < missing_bytes):
                evict.append(model)
                freed += self._residency.bytes_of(model)
        for other in order:
            if other in kept or not self._residency.kv_bytes(other.model, 1):
                continue
            for entry in self._running(other):
                if entry.is_here and (is_all or freed < missing_bytes):
                    offload.append(entry)
                    freed += self._kv_bytes(entry)
        return tuple(evict), offload, freed

    def _last_first(self, now: float) -> list[Batch]:
        """All batches, those with a turn soon last."""
        soon = list(self._upcoming(now))
        others = [batch for batch in self._batches if batch not in soon]
        return others + soon[::-1]

    def _by_need(self, order: Sequence[Batch]) -> list[ModelId]:
        """The resident models, those without requests first."""
        place = {batch.model: number for number, batch in enumerate(order)}
        return sorted(self._residency.evictable, key=lambda model: place.get(model, -1))

    def _find_relief(self, turn: Batch, now: float) -> Load | None:
        """Room for the next step of `turn`, with some to spare, or None when nobody has any."""
        missing = self._short_bytes(turn) + self._residency.kv_margin_bytes
        evict, offload, freed = self._make_room(turn, missing, now)
        if freed < self._short_bytes(turn):
            return None
        return Load(turn.model, evict, _ids(offload))

    def _short_bytes(self, turn: Batch) -> int:
        """What the next step of `turn` lacks, if its weights are here."""
        if not self._is_ready(turn.model):
            return 0
        need = self._residency.kv_bytes(turn.model, self._next_tokens(turn))
        return need - self._residency.free_bytes if need else 0

    def _is_short(self, turn: Batch, now: float) -> bool:
        """Whether `turn` waits for room that comes."""
        if self._short_bytes(turn) <= 0:
            return False
        is_coming = self._residency.loading is not None
        return is_coming or self._find_relief(turn, now) is not None

    def _kv_bytes(self, entry: Entry) -> int:
        return self._residency.kv_bytes(self._model_of[entry.id], entry.tokens)

    def _prompt_bytes(self, batch: Batch) -> int:
        """KV of the largest prompt of `batch` that waits."""
        tokens = max((entry.tokens + 1 for entry in self._waiting(batch)), default=0)
        return self._residency.kv_bytes(batch.model, tokens)


def _ids(entries: Iterable[Entry]) -> tuple[RequestId, ...]:
    return tuple(entry.id for entry in entries)

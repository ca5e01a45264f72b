"""The policy `turns`: one group of requests per model; groups take turns of a time quota.

In a turn new requests are prefilled a few at a time between decode steps of all running ones.
Models are loaded in the order in which their groups stand in line, beside the computation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aegaeon.scheduler.device import DeviceScheduler
from aegaeon.scheduler.groups import Entry, Group
from aegaeon.scheduler.ledger import Limits
from aegaeon.scheduler.residency import Residency
from aegaeon.types import Decode, Load, ModelId, Prefill, Role


class TurnLimits(Limits, frozen=True, kw_only=True):
    """A turn whose weights had to displace others lasts `amortise` times their load, up to
    `longest_turn_s`: where memory holds few models, a short quota would be spent on loading."""

    quota_s: float = 0.5
    amortise: float = 2.0
    longest_turn_s: float = 4.0


@dataclass(slots=True, eq=False)
class TurnGroup(Group):
    """A group in line. Those with work stand there by `ticket`, lowest first."""

    ticket: int = 0
    has_prefilled: bool = False  # the last step was a prefill
    unpaid_load_s: float = 0.0  # of what the next turn displaced; it is to be worth it


class TurnScheduler(DeviceScheduler[TurnGroup]):
    """Round robin over models with a time quota."""

    def __init__(
        self,
        residency: Residency,
        models: Sequence[ModelId],
        limits: TurnLimits,
        role: Role = "colocated",
    ) -> None:
        """`models` are those served. Nothing is resident yet."""
        super().__init__(residency, models, limits, role)
        self._turns = limits
        self._turn_ends_s = 0.0
        self._planned: Load | None = None  # decided with a turn's end, taken by next_load
        self._tickets = 0

    def _new_group(self, model: ModelId) -> TurnGroup:
        return TurnGroup(model)

    def _entered(self, group: TurnGroup, entry: Entry, now: float) -> None:  # noqa: ARG002
        if group.model not in self._active:
            group.ticket = self._next_ticket()

    def _choose(self, now: float) -> TurnGroup | None:
        """Whose step is next; may decide on a load that takes the device from the current model."""
        runnable = self._runnable(now)
        current = None if self._current is None else runnable.get(self._current)
        if current is not None and (now < self._turn_ends_s or len(runnable) == 1):
            return current
        candidate = self._first_resident(runnable, self._current) or current
        head = self._head(runnable, now)
        if head is None or self._residency.loading is not None:
            return candidate
        if candidate is None or candidate is current or head.ticket < candidate.ticket:
            self._make_way(head, candidate, runnable)
            if candidate is not None and not self._residency.is_resident(candidate.model):
                return self._first_resident(runnable, None)
        return candidate

    def _make_way(
        self, head: TurnGroup, candidate: TurnGroup | None, runnable: Mapping[ModelId, TurnGroup]
    ) -> None:
        """If `head` can only be loaded when `candidate` does not compute, plan just that.

        Without this, two resident models could pass the device to and fro while a third, too
        large for the room of one, waits for ever.
        """
        kept = set() if candidate is None else {candidate.model}
        if self._victims(head, runnable, kept) is not None:
            return  # next_load will find room beside it
        if candidate is not None and candidate.model == self._current:
            self._turn_ended(candidate)
        victims = self._victims(head, runnable, set())
        if victims is not None:
            self._planned = Load(head.model, victims)
            for victim in victims:
                self._leave_current(victim)
                self._residency.drop(victim)

    def _first_resident(
        self, runnable: Mapping[ModelId, TurnGroup], but: ModelId | None
    ) -> TurnGroup | None:
        ready = (
            group
            for model, group in runnable.items()
            if model != but and self._residency.is_resident(model)
        )
        return min(ready, key=lambda group: group.ticket, default=None)

    # Turns

    def _turn_began(self, group: TurnGroup, now: float) -> None:
        load_s, group.unpaid_load_s = group.unpaid_load_s, 0.0
        self._turn_ends_s = now + max(self._turns.quota_s, self._worth_s(load_s))

    def _turn_ended(self, group: TurnGroup) -> None:
        group.ticket = self._next_ticket()

    def _worth_s(self, load_s: float) -> float:
        return min(self._turns.amortise * load_s, self._turns.longest_turn_s)

    def _next_ticket(self) -> int:
        self._tickets += 1
        return self._tickets

    def _step(self, group: TurnGroup, now: float) -> Prefill | Decode:
        limits = self._limits
        wants = bool(group.waiting) and self._kv.may_prefill(group, now)
        has_room = len(group.running) < limits.max_running
        if group.running and (group.has_prefilled or not wants or not has_room):
            group.has_prefilled = False
            return Decode(group.model, group.pick_decode(limits.max_batch))
        most = limits.max_running - len(group.running)
        if group.kv_ticket is not None and not self._kv.is_held():
            most = 1  # alone it fits, or the engine refuses it
        group.has_prefilled = True
        picked = group.pick_prefill(min(most, limits.prefill_requests), limits.prefill_tokens)
        return Prefill(group.model, picked)

    # Loads

    def _pick_load(self, now: float) -> Load | None:
        """The first group in line without its weights."""
        if self._planned is not None:
            load, self._planned = self._planned, None
            return load
        runnable = self._runnable(now)
        head = self._head(runnable, now)
        if head is None:
            return None
        busy = set() if self._in_flight is None else {self._in_flight.model}
        if self._current is not None and (busy or self._current in runnable):
            busy.add(self._current)  # the lane may be about to leave it, but has not yet
        victims = self._victims(head, runnable, busy)
        return None if victims is None else Load(head.model, victims)

    def _has_loaded(self, group: TurnGroup, took_s: float, is_displacing: bool) -> None:
        """A turn that displaced others is to be worth it."""
        if is_displacing or group.loss_retry.failures:
            group.unpaid_load_s = took_s

    def _head(self, runnable: Mapping[ModelId, TurnGroup], now: float) -> TurnGroup | None:
        """The first group in line whose model is neither resident nor waits after a failure."""
        absent = (
            group
            for model, group in runnable.items()
            if not self._residency.is_resident(model) and group.load_at_s <= now
        )
        return min(absent, key=lambda group: group.ticket, default=None)

    def _victims(
        self, head: TurnGroup, runnable: Mapping[ModelId, TurnGroup], kept: set[ModelId]
    ) -> tuple[ModelId, ...] | None:
        """Whom to evict so that `head` fits, none of `kept`; None when there is no way.

        The idle go first, least recently used first; then those behind `head` in line, the last
        first. Those before it stay until they had their turn.
        """
        idle: list[ModelId] = []
        later: list[TurnGroup] = []
        for model in self._residency.resident:
            if model in kept:
                continue
            group = runnable.get(model)
            if group is None:
                idle.append(model)
            elif group.ticket > head.ticket:
                later.append(group)
        later.sort(key=lambda group: -group.ticket)
        return self._residency.plan(head.model, idle + [group.model for group in later])

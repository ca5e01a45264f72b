"""The policy `turns`: one group of requests per model; groups take turns of a time quota.

In a turn new requests are prefilled a few at a time between decode steps of all running ones.
Models are loaded in the order in which their groups stand in line, beside the computation.
"""

import heapq
from collections.abc import Iterable, Sequence

import msgspec

from aegaeon.errors import ModelNotFound, Overloaded
from aegaeon.scheduler.base import Scheduler, SchedulerSnapshot
from aegaeon.scheduler.groups import Group
from aegaeon.scheduler.residency import Residency
from aegaeon.types import (
    Action,
    ComputeAction,
    Decode,
    Idle,
    Load,
    Loaded,
    LoadFailed,
    ModelId,
    Outcome,
    Prefill,
    Request,
    RequestId,
    Stepped,
    Switch,
    Switched,
)

RETRY_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # between attempts at a model that does not load


class TurnLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The bounds of the policy. One prefill step takes at least one request, whatever its size.

    A turn whose weights had to displace others lasts `amortise` times their load, up to
    `longest_turn_s`: where memory holds few models, a short quota would be spent on loading.
    """

    quota_s: float = 0.5
    amortise: float = 2.0
    longest_turn_s: float = 4.0
    max_batch: int = 16
    max_waiting: int = 1024
    max_running: int = 32  # per model; beyond max_batch they decode in rotation
    prefill_requests: int = 4
    prefill_tokens: int = 2048


class TurnScheduler(Scheduler):
    """Round robin over models with a time quota. See DESIGN.md for the seam it stands behind."""

    def __init__(self, residency: Residency, models: Sequence[ModelId], limits: TurnLimits) -> None:
        """`models` are those served. Nothing is resident yet."""
        self._residency = residency
        self._limits = limits
        self._groups = {model: Group(model) for model in models}
        self._model_of: dict[RequestId, ModelId] = {}
        self._deadlines: list[tuple[float, RequestId]] = []  # heap, with left-overs of ended ones
        self._current: ModelId | None = None
        self._turn_ends_s = 0.0
        self._in_flight: ComputeAction | None = None
        self._planned: Load | None = None  # decided with a turn's end, taken by next_load
        self._load_displaces = False  # the load under way evicted others
        self._preload: list[ModelId] = []
        self._switches = 0
        self._tickets = 0

    def preload(self, models: Iterable[ModelId]) -> None:
        """Load `models` when the copy lane has nothing else to do and there is free room."""
        self._preload.extend(models)

    def submit(self, request: Request, now: float) -> None:  # noqa: ARG002  part of the seam
        """Put `request` behind its model's others. Raises Overloaded, ModelNotFound."""
        group = self._groups.get(request.model)
        if group is None:
            raise ModelNotFound(f"model {request.model} is not served here; see GET /v1/models")
        if sum(len(g.waiting) for g in self._groups.values()) >= self._limits.max_waiting:
            raise Overloaded(
                f"{self._limits.max_waiting} requests are waiting; try again later, or raise "
                "--max-waiting"
            )
        if not group.has_requests:
            group.ticket = self._next_ticket()
        tokens = len(request.prompt_token_ids) + len(request.generated_token_ids)
        group.waiting[request.id] = tokens
        self._model_of[request.id] = request.model
        heapq.heappush(self._deadlines, (request.deadline_s, request.id))

    def cancel(self, request: RequestId, now: float) -> None:  # noqa: ARG002  part of the seam
        """Forget `request`; if an action with it is under way, its part of the outcome is too."""
        self._forget(request)

    def expired(self, now: float) -> tuple[RequestId, ...]:
        """Return, once, the requests whose deadline is not after `now`."""
        expired: list[RequestId] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[1]
            if request in self._model_of:
                expired.append(request)
        if len(self._deadlines) > 2 * len(self._model_of) + 64:
            self._deadlines = [d for d in self._deadlines if d[1] in self._model_of]
            heapq.heapify(self._deadlines)
        return tuple(expired)

    def snapshot(self) -> SchedulerSnapshot:
        """Counts per model, those without requests left out."""
        groups = self._groups.values()
        return SchedulerSnapshot(
            current=self._current,
            resident=self._residency.resident,
            loading=self._residency.loading,
            waiting={g.model: len(g.waiting) for g in groups if g.waiting},
            running={g.model: len(g.running) for g in groups if g.running},
            switches=self._switches,
            preloading=tuple(self._preload),
        )

    def next_action(self, now: float) -> Action:
        """Go on with the current model's turn, or pass the device on at its end."""
        assert self._in_flight is None, "the compute lane is busy"
        runnable = self._runnable()
        group = self._choose(runnable, now)
        if group is None:
            return Idle(self._next_retry_s(now))
        if group.model != self._current:
            self._in_flight = Switch(group.model)
        else:
            self._in_flight = self._step(group)
        return self._in_flight

    def next_load(self, now: float) -> Load | None:
        """The first group in line without its weights; else a preload that needs no room made."""
        if self._planned is not None:
            load, self._planned = self._planned, None
            return load
        if self._residency.loading is not None:
            return None
        runnable = self._runnable()
        head = self._load_head(runnable, now)
        if head is None:
            return self._next_preload()
        busy = set() if self._in_flight is None else {self._in_flight.model}
        if self._current is not None and (busy or self._current in runnable):
            busy.add(self._current)  # the lane may be about to leave it, but has not yet
        victims = self._residency.plan(head.model, self._victims(head, runnable, busy))
        return None if victims is None else self._begin_load(head.model, victims)

    def complete(self, outcome: Outcome, now: float) -> None:
        """Update turns, residency and requests; outcomes of forgotten requests are ignored."""
        match outcome:
            case Switched():
                self._in_flight = None
                self._end_turn()
                self._current = outcome.model
                self._turn_ends_s = now + self._turn_s(self._groups[outcome.model])
                self._switches += 1
                self._residency.touch(outcome.model)
            case Stepped():
                self._on_stepped(outcome)
            case Loaded():
                self._residency.end_load(outcome.weight_bytes)
                self._groups[outcome.model].load_failures = 0
                if self._load_displaces:
                    self._groups[outcome.model].unpaid_load_s = outcome.took_s
                self._drop_preload(outcome.model)
            case LoadFailed():
                self._on_load_failed(self._groups[outcome.model], now)

    # Turns

    def _choose(self, runnable: dict[ModelId, Group], now: float) -> Group | None:
        """Whose step is next; may decide on a load that takes the device from the current model."""
        current = None if self._current is None else runnable.get(self._current)
        if current is not None and (now < self._turn_ends_s or len(runnable) == 1):
            return current
        candidate = self._first_resident(runnable, self._current) or current
        head = self._load_head(runnable, now)
        if head is None or self._residency.loading is not None:
            return candidate
        if candidate is None or candidate is current or head.ticket < candidate.ticket:
            self._make_way(head, candidate, runnable)
            if candidate is not None and not self._residency.is_resident(candidate.model):
                return self._first_resident(runnable, None)
        return candidate

    def _make_way(
        self, head: Group, candidate: Group | None, runnable: dict[ModelId, Group]
    ) -> None:
        """If `head` can only be loaded when `candidate` does not compute, plan just that.

        Without this, two resident models could pass the device to and fro while a third, too
        large for the room of one, waits for ever.
        """
        kept = set() if candidate is None else {candidate.model}
        if self._residency.plan(head.model, self._victims(head, runnable, kept)) is not None:
            return  # next_load will find room beside it
        if candidate is not None and candidate.model == self._current:
            self._end_turn()
        victims = self._residency.plan(head.model, self._victims(head, runnable, set()))
        if victims is not None:
            self._planned = self._begin_load(head.model, victims)

    def _turn_s(self, group: Group) -> float:
        load_s, group.unpaid_load_s = group.unpaid_load_s, 0.0
        worth_s = min(self._limits.amortise * load_s, self._limits.longest_turn_s)
        return max(self._limits.quota_s, worth_s)

    def _end_turn(self) -> None:
        if self._current is not None:
            self._groups[self._current].ticket = self._next_ticket()

    def _first_resident(self, runnable: dict[ModelId, Group], but: ModelId | None) -> Group | None:
        ready = (
            group
            for model, group in runnable.items()
            if model != but and self._residency.is_resident(model)
        )
        return min(ready, key=lambda group: group.ticket, default=None)

    def _step(self, group: Group) -> Prefill | Decode:
        limits = self._limits
        wants = self._may_prefill(group, self._kv_first()) and bool(group.waiting)
        has_room = len(group.running) < limits.max_running
        if group.running and (group.has_prefilled or not wants or not has_room):
            group.has_prefilled = False
            return Decode(group.model, group.pick_decode(limits.max_batch))
        most = limits.max_running - len(group.running)
        if group.kv_ticket is not None and not self._kv_is_held():
            most = 1  # alone it fits, or the engine refuses it
        group.has_prefilled = True
        picked = group.pick_prefill(min(most, limits.prefill_requests), limits.prefill_tokens)
        return Prefill(group.model, picked)

    # Requests

    def _on_stepped(self, outcome: Stepped) -> None:
        action, self._in_flight = self._in_flight, None
        assert isinstance(action, Prefill | Decode)
        group = self._groups[outcome.model]
        self._residency.touch(outcome.model)
        for token in outcome.tokens:
            if token.request_id in self._model_of:
                group.add_token(token.request_id)
        group.rotate(action.requests)
        if outcome.preempted:
            self._on_preempted(outcome.preempted)
        elif isinstance(action, Prefill):
            group.kv_ticket = None
        for token in outcome.tokens:
            if token.finish_reason is not None:
                self._forget(token.request_id)
        for request, _, _ in outcome.failed:
            self._forget(request)

    def _on_preempted(self, preempted: tuple[RequestId, ...]) -> None:
        """They wait in front of their own groups, which stand in line for KV from here on."""
        known = [request for request in preempted if request in self._model_of]
        losers = {
            self._model_of[request]: self._groups[self._model_of[request]] for request in known
        }
        held_kv = [
            group.put_back([r for r in known if self._model_of[r] == model])
            for model, group in losers.items()
        ]
        if any(held_kv):
            self._kv_freed()
        for group in losers.values():
            if group.kv_ticket is None:
                group.kv_ticket = self._next_ticket()
            group.kv_retry = False

    def _forget(self, request: RequestId) -> None:
        model = self._model_of.pop(request, None)
        if model is None:
            return
        group = self._groups[model]
        if group.remove(request):
            self._kv_freed()
        if not group.waiting:
            group.kv_ticket = None

    def _on_load_failed(self, group: Group, now: float) -> None:
        self._residency.end_load(None)
        group.retry_at_s = now + RETRY_S[min(group.load_failures, len(RETRY_S) - 1)]
        group.load_failures += 1
        self._drop_preload(group.model)
        for request in group.clear():
            del self._model_of[request]
        group.kv_ticket = None
        self._kv_freed()

    # KV: the group that ran out of it first is the only one to prefill until it has its share

    def _kv_freed(self) -> None:
        for group in self._groups.values():
            group.kv_retry = True

    def _kv_is_held(self) -> bool:
        return any(group.running for group in self._groups.values())

    def _kv_first(self) -> Group | None:
        """The group whose turn it is to try for KV, or None when nobody lacks it."""
        stalled = [g for g in self._groups.values() if g.kv_ticket is not None]
        return min(stalled, key=lambda group: group.kv_ticket or 0, default=None)

    def _may_prefill(self, group: Group, first: Group | None) -> bool:
        if first is None:
            return True
        return group is first and (group.kv_retry or not self._kv_is_held())

    def _runnable(self) -> dict[ModelId, Group]:
        """Groups that could make progress, were their model on the device."""
        first = self._kv_first()
        return {
            model: group
            for model, group in self._groups.items()
            if group.running or (group.waiting and (first is None or group is first))
            if group.running or self._may_prefill(group, first)
        }

    # Loads

    def _load_head(self, runnable: dict[ModelId, Group], now: float) -> Group | None:
        """The first group in line whose model is neither resident nor waits after a failure."""
        absent = (
            group
            for model, group in runnable.items()
            if not self._residency.is_resident(model) and group.retry_at_s <= now
        )
        return min(absent, key=lambda group: group.ticket, default=None)

    def _victims(
        self, head: Group, runnable: dict[ModelId, Group], kept: set[ModelId]
    ) -> list[ModelId]:
        """Whom `head` may displace, best first: the idle, least recently used first; then those
        behind it in line, the last first. Those before it stay until they had their turn."""
        idle: list[ModelId] = []
        later: list[Group] = []
        for model in self._residency.resident:
            group = self._groups[model]
            if model in kept:
                continue
            if model not in runnable:
                idle.append(model)
            elif group.ticket > head.ticket:
                later.append(group)
        later.sort(key=lambda group: -group.ticket)
        return idle + [group.model for group in later]

    def _begin_load(self, model: ModelId, victims: tuple[ModelId, ...]) -> Load:
        if self._current in victims:
            self._end_turn()
            self._current = None
        self._residency.begin_load(model, victims)
        self._load_displaces = bool(victims)
        return Load(model, victims)

    def _next_preload(self) -> Load | None:
        while self._preload:
            model = self._preload[0]
            fits = self._residency.plan(model, ()) is not None
            if fits and not self._residency.is_resident(model):
                return self._begin_load(model, ())
            self._preload.pop(0)
        return None

    def _drop_preload(self, model: ModelId) -> None:
        self._preload = [other for other in self._preload if other != model]

    def _next_retry_s(self, now: float) -> float | None:
        retries = (g.retry_at_s for g in self._groups.values() if g.waiting)
        return min((at for at in retries if at > now), default=None)

    def _next_ticket(self) -> int:
        self._tickets += 1
        return self._tickets

"""The policy `turns`: one group of requests per model; groups take turns of a time quota.

In a turn new requests are prefilled a few at a time between decode steps of all running ones.
Models are loaded in the order in which their groups stand in line, beside the computation.
"""

from collections import deque
from collections.abc import Iterable, Sequence

import msgspec

from aegaeon.errors import InvalidRequest, ModelNotFound, Overloaded
from aegaeon.scheduler.base import Scheduler, SchedulerSnapshot
from aegaeon.scheduler.deadlines import Deadlines
from aegaeon.scheduler.groups import Group
from aegaeon.scheduler.kv_line import KvLine
from aegaeon.scheduler.loads import Loads
from aegaeon.scheduler.residency import Residency
from aegaeon.types import (
    Action,
    ComputeAction,
    Decode,
    Failure,
    Handoff,
    Idle,
    Load,
    Loaded,
    LoadFailed,
    ModelId,
    Outcome,
    Prefill,
    Request,
    RequestId,
    Role,
    Stepped,
    Switch,
    Switched,
    WeightsLost,
)

MAX_KV_RETRIES = 14  # while nobody here holds KV: about 10 s


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
    """Round robin over models with a time quota. See DESIGN.md for the seam it stands behind.

    With the role `prefill` requests leave as Handoff once they have a token; `adopt` is how they
    come to the other roles.
    """

    def __init__(
        self,
        residency: Residency,
        models: Sequence[ModelId],
        limits: TurnLimits,
        role: Role = "colocated",
    ) -> None:
        """`models` are those served. Nothing is resident yet."""
        self._residency = residency
        self._limits = limits
        self._role = role
        self._groups = {model: Group(model) for model in models}
        self._kv = KvLine(self._groups)
        self._loads = Loads(residency, self._groups)
        self._model_of: dict[RequestId, ModelId] = {}
        self._deadlines = Deadlines()
        self._handoffs: deque[RequestId] = deque()  # with left-overs of ended ones
        self._hopeless: list[Failure] = []
        self._current: ModelId | None = None
        self._turn_ends_s = 0.0
        self._in_flight: ComputeAction | None = None
        self._planned: Load | None = None  # decided with a turn's end, taken by next_load
        self._switches = 0
        self._tickets = 0

    def preload(self, models: Iterable[ModelId]) -> None:
        """Load `models` when the copy lane has nothing else to do and there is free room."""
        self._loads.preload(models)

    def submit(self, request: Request, now: float) -> None:  # noqa: ARG002  part of the seam
        """Put `request` behind its model's others. Raises Overloaded, ModelNotFound."""
        group = self._group_of(request)
        if sum(len(g.waiting) for g in self._groups.values()) >= self._limits.max_waiting:
            raise Overloaded(
                f"{self._limits.max_waiting} requests are waiting; try again later, or raise "
                "--max-waiting"
            )
        self._enter(request, group)
        group.waiting[request.id] = _tokens(request)

    def adopt(self, request: Request, now: float) -> None:  # noqa: ARG002  part of the seam
        """Run `request` beside its model's others. Raises Overloaded, also when others here lack
        KV, ModelNotFound, and InvalidRequest with the role `prefill`."""
        if self._role == "prefill":
            raise InvalidRequest("this instance does not decode; hand it to one that does")
        group = self._group_of(request)
        if self._kv.first() is not None:
            raise Overloaded("sequences here wait for KV; try again later")
        if len(self._model_of) >= self._limits.max_waiting:
            raise Overloaded(f"{len(self._model_of)} requests are here; try again later")
        self._enter(request, group)
        group.running[request.id] = _tokens(request)

    def cancel(self, request: RequestId, now: float) -> None:  # noqa: ARG002  part of the seam
        """Forget `request`; if an action with it is under way, its part of the outcome is too."""
        self._forget(request)

    def expired(self, now: float) -> tuple[RequestId, ...]:
        """Return, once, the requests whose deadline is not after `now`."""
        return self._deadlines.expired(now, self._model_of)

    def given_up(self) -> tuple[Failure, ...]:
        """Return, once, the requests that waited in vain."""
        hopeless, self._hopeless = self._hopeless, []
        return tuple(failure for failure in hopeless if failure[0] in self._model_of)

    def snapshot(self) -> SchedulerSnapshot:
        """Counts per model, those without requests left out."""
        groups = self._groups.values()
        running = {g.model: len(g.running) + len(g.leaving) for g in groups}
        return SchedulerSnapshot(
            current=self._current,
            resident=self._residency.resident,
            loading=self._residency.loading,
            waiting={g.model: len(g.waiting) for g in groups if g.waiting},
            running={model: count for model, count in running.items() if count},
            switches=self._switches,
            preloading=self._loads.preloading,
        )

    def next_action(self, now: float) -> Action:
        """Let go what is prefilled; then go on with the current model's turn, or pass the device
        on at its end."""
        assert self._in_flight is None, "the compute lane is busy"
        while self._handoffs:
            request = self._handoffs.popleft()
            model = self._model_of.get(request)
            if model is not None and request in self._groups[model].leaving:
                return Handoff(request)
        runnable = self._kv.runnable(now)
        group = self._choose(runnable, now)
        if group is None:
            retries = (self._loads.next_retry_s(now), self._kv.next_retry_s(now))
            return Idle(min((at for at in retries if at is not None), default=None))
        if group.model != self._current:
            self._in_flight = Switch(group.model)
        else:
            self._in_flight = self._step(group, now)
        return self._in_flight

    def next_load(self, now: float) -> Load | None:
        """The first group in line without its weights; else a preload that needs no room made."""
        if self._planned is not None:
            load, self._planned = self._planned, None
            return load
        if self._residency.loading is not None:
            return None
        if self._in_flight is not None and not self._residency.is_resident(self._in_flight.model):
            return None  # evicted meanwhile: the outcome will say what became of the action
        runnable = self._kv.runnable(now)
        head = self._loads.head(runnable, now)
        if head is None:
            model = self._loads.next_preload()
            return None if model is None else self._begin_load(model, ())
        busy = set() if self._in_flight is None else {self._in_flight.model}
        if self._current is not None and (busy or self._current in runnable):
            busy.add(self._current)  # the lane may be about to leave it, but has not yet
        victims = self._loads.victims(head, runnable, busy)
        return None if victims is None else self._begin_load(head.model, victims)

    def complete(self, outcome: Outcome, now: float) -> None:
        """Update turns, residency and requests; outcomes of forgotten requests are ignored."""
        match outcome:
            case Switched():
                self._on_switched(outcome.model, now)
            case Stepped():
                self._on_stepped(outcome, now)
            case WeightsLost():
                self._on_weights_lost(self._groups[outcome.model], now)
            case Loaded():
                for model in outcome.evicted:
                    self._drop(model)
                self._loads.loaded(outcome)
            case LoadFailed():
                self._on_load_failed(self._groups[outcome.model], now)

    # Turns

    def _choose(self, runnable: dict[ModelId, Group], now: float) -> Group | None:
        """Whose step is next; may decide on a load that takes the device from the current model."""
        current = None if self._current is None else runnable.get(self._current)
        if current is not None and (now < self._turn_ends_s or len(runnable) == 1):
            return current
        candidate = self._first_resident(runnable, self._current) or current
        head = self._loads.head(runnable, now)
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
        if self._loads.victims(head, runnable, kept) is not None:
            return  # next_load will find room beside it
        if candidate is not None and candidate.model == self._current:
            self._end_turn()
        victims = self._loads.victims(head, runnable, set())
        if victims is not None:
            self._planned = self._begin_load(head.model, victims)

    def _begin_load(self, model: ModelId, victims: tuple[ModelId, ...]) -> Load:
        self._leave_current(victims)
        self._loads.begin(model, victims)
        return Load(model, victims)

    def _drop(self, model: ModelId) -> None:
        """The weights of `model` are not here any more."""
        self._leave_current((model,))
        self._residency.drop(model)

    def _on_weights_lost(self, group: Group, now: float) -> None:
        """From either lane, as `_on_load_failed`; a load that is put off costs no request."""
        if self._residency.loading == group.model:
            self._loads.failed(group, now)
        else:
            self._in_flight = None
            self._drop(group.model)
            self._hopeless += self._loads.lost(group, now, self._worth_s(group.load_s))

    def _leave_current(self, gone: tuple[ModelId, ...]) -> None:
        """The device is nobody's when the weights of the current model are among those `gone`."""
        if self._current in gone:
            self._end_turn()
            self._current = None

    def _on_switched(self, model: ModelId, now: float) -> None:
        self._in_flight = None
        self._end_turn()
        self._switches += 1
        self._residency.touch(model)
        # Evicted during the switch, if not resident.
        self._current = model if self._residency.is_resident(model) else None
        self._turn_ends_s = now + self._turn_s(self._groups[model])

    def _turn_s(self, group: Group) -> float:
        load_s, group.unpaid_load_s = group.unpaid_load_s, 0.0
        return max(self._limits.quota_s, self._worth_s(load_s))

    def _worth_s(self, load_s: float) -> float:
        """How long to compute for a load to be worth it."""
        return min(self._limits.amortise * load_s, self._limits.longest_turn_s)

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

    def _step(self, group: Group, now: float) -> Prefill | Decode:
        limits = self._limits
        wants = self._kv.may_prefill(group, self._kv.first(), now) and bool(group.waiting)
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

    # Requests

    def _group_of(self, request: Request) -> Group:
        group = self._groups.get(request.model)
        if group is None:
            raise ModelNotFound(f"model {request.model} is not served here; see GET /v1/models")
        return group

    def _enter(self, request: Request, group: Group) -> None:
        if not group.has_requests:
            group.ticket = self._next_ticket()
        self._model_of[request.id] = request.model
        self._deadlines.add(request.id, request.deadline_s)

    def _on_stepped(self, outcome: Stepped, now: float) -> None:
        action, self._in_flight = self._in_flight, None
        assert isinstance(action, Prefill | Decode)
        group = self._groups[outcome.model]
        self._residency.touch(outcome.model)
        for token in outcome.tokens:
            if token.request_id in self._model_of:
                group.add_token(token.request_id)
        group.rotate(action.requests)
        if outcome.tokens:
            group.has_gained = True
            group.loss_retry.reset()
            group.kv_retry.reset()
        if outcome.preempted:
            self._on_preempted(outcome, now)
        elif isinstance(action, Prefill):
            group.leave_kv_line()
        for token in outcome.tokens:
            if token.finish_reason is not None:
                self._forget(token.request_id)
        for request, _, _ in outcome.failed:
            self._forget(request)
        if self._role == "prefill":
            for request in tuple(group.running):
                group.leave(request)
                self._handoffs.append(request)

    def _on_preempted(self, outcome: Stepped, now: float) -> None:
        """They wait in front of their own groups, which stand in line for KV from here on."""
        known = [request for request in outcome.preempted if request in self._model_of]
        losers = {
            self._model_of[request]: self._groups[self._model_of[request]] for request in known
        }
        held_kv = [
            group.put_back([r for r in known if self._model_of[r] == model])
            for model, group in losers.items()
        ]
        if any(held_kv):
            self._kv.freed()
        self._kv.join(losers.values(), self._next_ticket, now)
        for request in known:
            retry = losers[self._model_of[request]].kv_retry
            if retry.failures >= MAX_KV_RETRIES:
                # It would fit: the engine refuses at once what does not. So a client may try again.
                self._hopeless.append((request, Overloaded.code, outcome.shortage))
                retry.at_s = now  # the next in line may need less

    def _forget(self, request: RequestId) -> None:
        model = self._model_of.pop(request, None)
        if model is None:
            return
        group = self._groups[model]
        if group.remove(request):
            self._kv.freed()
        if not group.waiting:
            group.leave_kv_line()

    def _on_load_failed(self, group: Group, now: float) -> None:
        """From either lane: a model that is not being loaded counted as resident, and computed."""
        if self._residency.loading != group.model:
            self._in_flight = None
            self._drop(group.model)
        self._loads.failed(group, now)
        for request in group.clear():
            del self._model_of[request]
        group.leave_kv_line()
        self._kv.freed()

    def _next_ticket(self) -> int:
        self._tickets += 1
        return self._tickets


def _tokens(request: Request) -> int:
    return len(request.prompt_token_ids) + len(request.generated_token_ids)

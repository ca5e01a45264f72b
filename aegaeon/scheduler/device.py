"""What all policies share: the requests of one device, its weights, and what outcomes change.

A policy says whose step is next, what it is, and what is loaded; it stands in a file of its own.
"""

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence

from aegaeon.errors import Overloaded
from aegaeon.explanations import Decision
from aegaeon.scheduler.decisions import GOES_ON, Decisions
from aegaeon.scheduler.groups import Standing
from aegaeon.scheduler.ledger import GroupT, Ledger, Limits
from aegaeon.scheduler.observer import Observer, tell
from aegaeon.scheduler.residency import Residency
from aegaeon.types import (
    Action,
    ComputeAction,
    Decode,
    Handoff,
    Idle,
    Load,
    Loaded,
    LoadFailed,
    ModelId,
    Outcome,
    Prefill,
    Ran,
    RequestId,
    Role,
    Stepped,
    Switch,
    Switched,
    WeightsLost,
)

MAX_KV_RETRIES = 14  # while nobody here holds KV: about 10 s
LONGEST_WORTH_S = 4.0  # no load entitles to more of the device, where others wait for the room


class DeviceScheduler(Ledger[GroupT]):
    """A scheduler but for its policy. With the role `prefill` requests leave as Handoff once they
    have a token; `adopt` is how they come to the other roles."""

    def __init__(
        self,
        residency: Residency,
        models: Sequence[ModelId],
        limits: Limits,
        role: Role = "colocated",
    ) -> None:
        """`models` are those served. Nothing is resident yet."""
        super().__init__(residency, models, limits, role)
        self._handoffs: deque[RequestId] = deque()  # with left-overs of ended ones
        self._in_flight: ComputeAction | None = None
        self._reserved_tokens = 0  # of KV, for the prefill in flight
        self._arriving: tuple[RequestId, ...] = ()  # whose KV the load under way brings
        self._arriving_tokens = 0
        self._load_retry_s = math.inf  # asked again then, though nothing has happened
        self._decoding: Decode | None = None  # what goes on
        self._steps_done = 0  # of it
        self._reason = ""  # of the decision that is being made
        self.decisions = Decisions()
        self.observer: Observer | None = None  # hears what actions took

    # What a policy says

    @abstractmethod
    def _choose(self, now: float) -> GroupT | None:
        """Return whose step is next, resident, or None while there is nothing to compute."""

    @abstractmethod
    def _step(self, group: GroupT, now: float) -> Prefill | Decode | None:
        """Return the next step of `group`, whose turn it is, or None to wait."""

    @abstractmethod
    def _pick_load(self, now: float) -> Load | None:
        """Return what to bring in; the copy lane is free."""

    def _turn_began(self, group: GroupT, now: float) -> None:
        """`group` has the device from here on."""

    def _turn_ended(self, group: GroupT) -> None:
        """`group` no longer has the device."""

    def _stepped(self, group: GroupT, action: Prefill | Decode, now: float) -> None:
        """A step of `group` ended; its requests are up to date."""

    def _has_loaded(self, group: GroupT, took_s: float, is_displacing: bool) -> None:
        """The weights of `group` are here; others made way for them if `is_displacing`."""

    def _worth_s(self, load_s: float) -> float:
        """Return how long to compute for a load to be worth it."""
        return min(2.0 * load_s, LONGEST_WORTH_S)

    # Actions

    def recent(
        self, request: RequestId | None, model: ModelId | None, limit: int
    ) -> tuple[Decision, ...]:
        """Of the last few thousand."""
        return self.decisions.recent(request, model, limit)

    def next_action(self, now: float) -> Action:
        """Let go what is prefilled; then what the policy says."""
        assert self._in_flight is None, "the compute lane is busy"
        action = self._next_action(now)
        self.decisions.note(now, action, self._reason)
        return action

    def _next_action(self, now: float) -> Action:
        while self._handoffs:
            request = self._handoffs.popleft()
            model = self._model_of.get(request)
            if model is not None and request in self._groups[model].leaving:
                self._reason = "prefilled"
                return Handoff(request)
        if self._goes_on(now):
            assert self._decoding is not None
            self._reason = GOES_ON
            decode = self._decoding
            left = decode.stretch.after(self._steps_done)
            self._in_flight = Decode(decode.model, decode.requests, left)
            return self._in_flight
        self._reason = ""
        self._is_load_stale = True
        group = self._choose(now)
        step: ComputeAction | None = None
        if group is not None:
            is_turn = group.model == self._current
            step = self._step(group, now) if is_turn else Switch(group.model)
        if step is None:
            self._reason = self._reason or ("no_requests" if not self._active else "not_loaded")
            self._decoding = None
            retries = (self._loads.next_retry_s(self._active, now), self._kv.next_retry_s(now))
            return Idle(min((at for at in retries if at is not None), default=None))
        self._in_flight = step
        self._is_stale = False
        self._steps_done = 0
        self._decoding = step if isinstance(step, Decode) else None
        if isinstance(step, Prefill) and group is not None:
            new = [group.waiting[r] for r in step.requests if r not in group.begun]
            tokens = sum(entry.tokens for entry in new) + len(step.requests)
            self._reserved_tokens = tokens
            self._hold_kv(group, tokens)
        return step

    def _goes_on(self, now: float) -> bool:
        """Whether the decode goes on that was decided last."""
        decode = None if self._is_stale else self._decoding
        return decode is not None and not decode.stretch.is_over(self._steps_done, now)

    def next_load(self, now: float) -> Load | None:
        """What the policy says; else a preload that needs no room made."""
        if self._residency.loading is not None:
            return None
        if not self._is_load_stale and now < self._load_retry_s:
            return None
        if self._in_flight is not None and not self._residency.is_resident(self._in_flight.model):
            return None  # evicted meanwhile: the outcome will say what became of the action
        self._is_load_stale = False
        self._reason = ""
        load = self._pick_load(now)
        if load is None:
            model = self._loads.next_preload()
            if model is None:
                retry_s = self._loads.next_retry_s(self._active, now)
                self._load_retry_s = math.inf if retry_s is None else retry_s
                return None
            self._reason = "preload"
            load = Load(model)
        self._begin_load(load)
        self.decisions.note(now, load, self._reason)
        return load

    def _begin_load(self, load: Load) -> None:
        self._something_happened()
        for model in load.evict:
            self._leave_current(model)
        for request in load.offload:
            self._move_kv(request, False)
        self._loads.begin(load)
        group = self._group(load.model)
        self._arriving = load.bring
        self._arriving_tokens = sum(e.tokens for e in group.holders if e.id in load.bring)
        self._hold_kv(group, self._arriving_tokens)

    def _is_used(self, model: ModelId) -> bool:
        """As of the base; also while it computes."""
        in_flight = self._in_flight
        return (in_flight is not None and in_flight.model == model) or super()._is_used(model)

    def _forget_weights(self, model: ModelId) -> None:
        self._drop(model)

    def _leave_current(self, model: ModelId) -> None:
        """The device is nobody's when the weights of the current model go."""
        if self._current == model:
            self._turn_ended(self._groups[model])
            self._current = None

    def _drop(self, model: ModelId) -> None:
        """The weights of `model` are not here any more."""
        self._leave_current(model)
        self._residency.drop(model)

    # Outcomes

    def complete(self, outcome: Outcome, now: float) -> None:
        """Update turns, residency and requests; outcomes of forgotten requests are ignored."""
        match outcome:
            case Ran():
                self._on_ran(outcome, now)
                return
            case Stepped():
                self._on_stepped(outcome, now)
                if self._decoding is not None and not outcome.preempted:
                    return
            case Switched():
                self._on_switched(outcome.model, now)
            case WeightsLost():
                self._on_weights_lost(self._group(outcome.model), now)
            case Loaded():
                self._on_loaded(outcome)
            case LoadFailed():
                self._on_load_failed(self._group(outcome.model), now)
        self._something_happened()

    def _end_in_flight(self) -> ComputeAction | None:
        """The compute lane is free; KV that a prefill was to take is not reserved any more."""
        action, self._in_flight = self._in_flight, None
        if self._reserved_tokens:
            assert action is not None
            self._hold_kv(self._groups[action.model], -self._reserved_tokens)
            self._reserved_tokens = 0
        return action

    def _on_switched(self, model: ModelId, now: float) -> None:
        self._end_in_flight()
        if self._current is not None:
            self._turn_ended(self._groups[self._current])
        self._switches += 1
        self._residency.touch(model)
        # Evicted during the switch, if not resident.
        self._current = model if self._residency.is_resident(model) else None
        self._turn_began(self._groups[model], now)

    def _on_ran(self, outcome: Ran, now: float) -> None:
        action = self._end_in_flight()
        assert isinstance(action, Decode)
        group = self._groups[outcome.model]
        self._shares.charge(action.requests, outcome.took_s)
        self._steps_done += outcome.steps
        self._residency.touch(outcome.model)
        entries = [group.running[r] for r in action.requests if r in group.running]
        for entry in entries:
            entry.tokens += outcome.steps
            entry.made += outcome.steps
        self._hold_kv(group, outcome.steps * len(entries))
        if len(group.running) > len(action.requests):
            group.rotate(action.requests)
        self._gained(group)
        for request in outcome.ended:
            self._forget(request)
        self._stepped(group, action, now)

    def _on_stepped(self, outcome: Stepped, now: float) -> None:
        action = self._end_in_flight()
        assert isinstance(action, Prefill | Decode)
        group = self._groups[outcome.model]
        self._shares.charge(action.requests, outcome.took_s)
        if self.observer is not None:
            tell(self.observer, group, action, outcome)
        self._steps_done += 1
        self._residency.touch(outcome.model)
        for token in outcome.tokens:
            if token.request_id in self._model_of:
                self._add_token(group, token.request_id, now)
        for begun in outcome.begun:
            self._begin(group, begun)
        if len(group.running) > len(action.requests):
            group.rotate(action.requests)
        if outcome.tokens or outcome.begun:
            self._gained(group)
            group.kv_retry.reset()
        if outcome.preempted:
            self._on_preempted(outcome, now)
        elif isinstance(action, Prefill):
            self._kv.leave(group)
        for token in outcome.tokens:
            if token.finish_reason is not None:
                self._forget(token.request_id)
        for request, _, _ in outcome.failed:
            self._forget(request)
        if self._role == "prefill":
            self._let_go(group)
        self._stepped(group, action, now)

    def _add_token(self, group: GroupT, request: RequestId, now: float) -> None:
        if request in group.waiting:
            has_kv = request in group.begun
            entry = group.begin_running(request, now)
            self._waiting_count -= 1
            self._hold_kv(group, 1 if has_kv else entry.tokens)
        else:
            entry = group.running[request]
            entry.tokens += 1
            entry.made += 1
            self._hold_kv(group, 1)

    def _gained(self, group: GroupT) -> None:
        group.has_gained = True
        group.loss_retry.reset()

    def _let_go(self, group: GroupT) -> None:
        for request in tuple(group.running):
            group.leave(request)
            self._handoffs.append(request)
        self._quiet(group)

    def standing_of(self, request: RequestId) -> Standing | None:
        """Return how `request` stands here; None: it is not known."""
        model = self._model_of.get(request)
        return None if model is None else self._groups[model].standing_of(request)

    def part(self, request: RequestId) -> None:
        """Have a running request leave for another instance, as after a Handoff; the compute lane
        is free."""
        assert self._in_flight is None, "the compute lane is busy"
        group = self._groups[self._model_of[request]]
        group.leave(request)
        self._quiet(group)
        self._changed(group)
        self._something_happened()

    def _on_preempted(self, outcome: Stepped, now: float) -> None:
        """They wait in front of their own groups, which stand in line for KV from here on."""
        known = [request for request in outcome.preempted if request in self._model_of]
        losers = {
            self._model_of[request]: self._groups[self._model_of[request]] for request in known
        }
        has_held = False
        for model, group in losers.items():
            has_held |= self._put_back(group, [r for r in known if self._model_of[r] == model])
            self._changed(group)
        if has_held:
            self._kv.freed()
        self._kv.join(losers.values(), now)
        for request in known:
            retry = losers[self._model_of[request]].kv_retry
            if retry.failures >= MAX_KV_RETRIES:
                # It would fit: the engine refuses at once what does not. So a client may try again.
                self._hopeless.append((request, Overloaded.code, outcome.shortage))
                retry.at_s = now  # the next in line may need less

    def _on_loaded(self, outcome: Loaded) -> None:
        for model in outcome.evicted:
            self._drop(model)
        group = self._group(outcome.model)
        self._kv_arrived(group)
        if self._loads.loaded(group, outcome):
            if self.observer is not None and outcome.is_whole:
                self.observer.loaded(group.model, outcome.took_s)
            self._has_loaded(group, outcome.took_s, self._loads.has_displaced)

    def _kv_arrived(self, group: GroupT, *, is_here: bool = True) -> None:
        """The load that was to bring KV has ended, well or not."""
        arriving, self._arriving = self._arriving, ()
        self._hold_kv(group, -self._arriving_tokens)
        self._arriving_tokens = 0
        for request in arriving:
            if is_here and group.holder(request) is not None:
                self._move_kv(request, True)

    def _on_weights_lost(self, group: GroupT, now: float) -> None:
        """From either lane, as `_on_load_failed`; a load that is put off costs no request."""
        if self._residency.loading == group.model:
            self._kv_arrived(group, is_here=False)
            self._loads.failed(group, now)
        else:
            self._end_in_flight()
            self._drop(group.model)
            self._hopeless += self._loads.lost(group, now, self._worth_s(group.load_s))

    def _on_load_failed(self, group: GroupT, now: float) -> None:
        """From either lane: a model that is not being loaded counted as resident, and computed."""
        if self._residency.loading != group.model:
            self._end_in_flight()
            self._drop(group.model)
        else:
            self._kv_arrived(group, is_here=False)
        self._loads.failed(group, now)
        for request in (*group.waiting, *group.running):
            self._forget(request)
        self._kv.leave(group)

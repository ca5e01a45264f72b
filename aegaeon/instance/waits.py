"""What each request of an instance waits for: the queue, weights on their way, other models' turns.

Pure bookkeeping: times come in. A request costs something only when it comes, begins, loses its
turn for good or ends; in between, the clocks of its model run.
"""

from dataclasses import dataclass, field
from enum import Enum

import msgspec

from aegaeon.measures import Waited
from aegaeon.types import (
    ComputeAction,
    Load,
    ModelId,
    Outcome,
    Request,
    Stepped,
    Switch,
    Switched,
)


class State(Enum):
    """Where a request stands: new, at work (whoever has the device), or without its KV."""

    QUEUED = "queued"
    AT_WORK = "at work"
    PUT_BACK = "put back"


@dataclass(slots=True)
class _Clock:
    """Seconds in which something was so."""

    total_s: float = 0.0
    since_s: float | None = None

    def at(self, now: float) -> float:
        """What it shows."""
        return self.total_s + (0.0 if self.since_s is None else now - self.since_s)

    def run(self, is_so: bool, now: float) -> None:
        """From here on it is so, or not."""
        self.total_s = self.at(now)
        self.since_s = now if is_so else None


@dataclass(slots=True)
class _Clocks:
    """Of one model: how long it has been coming, of that been loaded, and had the device, and how
    often it got it."""

    coming: _Clock = field(default_factory=_Clock)
    loading: _Clock = field(default_factory=_Clock)
    turn: _Clock = field(default_factory=_Clock)
    switches: int = 0
    coming_lanes: int = 0
    loads: int = 0
    has_turn: bool = False

    def change(
        self, now: float, lanes: int = 0, has_turn: bool | None = None, loads: int = 0
    ) -> None:
        """So many more lanes bring it, by loads or not, and it has the device or not. What comes
        while it has the device, keys and values of some of its requests, holds up nobody else's."""
        self.coming_lanes += lanes
        self.loads += loads
        if has_turn is not None:
            self.has_turn = has_turn
        self.turn.run(self.has_turn, now)
        self.coming.run(self.coming_lanes > 0 and not self.has_turn, now)
        self.loading.run(self.loads > 0 and not self.has_turn, now)


@dataclass(slots=True)
class Wait:
    """One request's. `told` is what its proxy has been told."""

    model: ModelId
    so_far: Waited
    state: State
    since_s: float
    coming_s: float
    loading_s: float
    turn_s: float
    switches: int
    told: Waited | None = None


class Waits:
    """Owned by one runtime, which tells it of all that its lanes begin and end."""

    def __init__(self) -> None:
        self._clocks: dict[ModelId, _Clocks] = {}
        self._turn: ModelId | None = None

    # Lanes

    def begin(self, action: ComputeAction, now: float) -> None:
        """The compute lane begins `action`."""
        if isinstance(action, Switch):
            self._end_turn(now)
            self._of(action.model).change(now, lanes=1)

    def end(self, action: ComputeAction, outcome: Outcome, now: float) -> None:
        """The compute lane has ended `action`."""
        clocks = self._of(action.model)
        if isinstance(action, Switch):
            clocks.change(now, lanes=-1)
        if isinstance(outcome, Switched):
            clocks.switches += 1
            clocks.change(now, has_turn=True)
            self._turn = action.model
        elif not isinstance(outcome, Stepped) and self._turn == action.model:
            self._end_turn(now)  # its weights are gone

    def begin_load(self, load: Load, now: float) -> None:
        """The copy lane begins `load`."""
        if self._turn in load.evict:
            self._end_turn(now)
        self._of(load.model).change(now, lanes=1, loads=1)

    def end_load(self, load: Load, now: float) -> None:
        """The copy lane has ended `load`."""
        self._of(load.model).change(now, lanes=-1, loads=-1)

    def forget(self, model: ModelId) -> None:
        """`model` is served no more, and nothing of it waits here."""
        if self._turn == model:
            self._turn = None
        self._clocks.pop(model, None)

    # Requests

    def enter(self, request: Request, now: float) -> Wait:
        """A request came. One without tokens has been waiting since its arrival, wherever."""
        has_begun = bool(request.generated_token_ids)
        wait = Wait(request.model, request.waited, State.PUT_BACK, now, 0.0, 0.0, 0.0, 0)
        if not has_begun:
            wait.state = State.QUEUED
            before_s = max(0.0, now - request.arrival_s - _total_s(request.waited))
            wait.so_far = msgspec.structs.replace(
                request.waited, queue_s=request.waited.queue_s + before_s
            )
        self._read(wait, now)
        return wait

    def adopt(self, request: Request, now: float) -> Wait:
        """A request came that has its KV."""
        wait = self.enter(request, now)
        wait.state = State.AT_WORK
        return wait

    def note(self, wait: Wait, state: State, now: float) -> None:
        """The request goes on as `state` says."""
        if state is not wait.state:
            wait.so_far = self.waited(wait, now)
            wait.state = state
            self._read(wait, now)

    def waited(self, wait: Wait, now: float) -> Waited:
        """Return what the request has waited for by now."""
        clocks, so_far = self._of(wait.model), wait.so_far
        elapsed_s = max(0.0, now - wait.since_s)
        switch_s = min(elapsed_s, clocks.coming.at(now) - wait.coming_s)
        load_s = min(switch_s, clocks.loading.at(now) - wait.loading_s)
        rest_s = elapsed_s - switch_s
        if wait.state is State.AT_WORK:
            rest_s = max(0.0, rest_s - (clocks.turn.at(now) - wait.turn_s))
        is_queued = wait.state is State.QUEUED
        return Waited(
            so_far.queue_s + (rest_s if is_queued else 0.0),
            so_far.switch_s + switch_s,
            so_far.switches + clocks.switches - wait.switches,
            so_far.preempted_s + (0.0 if is_queued else rest_s),
            so_far.load_s + load_s,
        )

    def news(self, wait: Wait, is_last: bool, now: float) -> Waited | None:
        """Return what to tell with a token: with the first, the last, and after each wait."""
        told = wait.told
        if told is not None and not is_last:
            switches = wait.so_far.switches + self._of(wait.model).switches - wait.switches
            if told.switches == switches:
                return None
        wait.told = self.waited(wait, now)
        return wait.told

    def _read(self, wait: Wait, now: float) -> None:
        clocks = self._of(wait.model)
        wait.since_s = now
        wait.coming_s, wait.loading_s = clocks.coming.at(now), clocks.loading.at(now)
        wait.turn_s = clocks.turn.at(now)
        wait.switches = clocks.switches

    def _end_turn(self, now: float) -> None:
        if self._turn is not None:
            self._of(self._turn).change(now, has_turn=False)
            self._turn = None

    def _of(self, model: ModelId) -> _Clocks:
        clocks = self._clocks.get(model)
        if clocks is None:
            clocks = self._clocks[model] = _Clocks()
        return clocks


def _total_s(waited: Waited) -> float:
    return waited.queue_s + waited.switch_s + waited.preempted_s

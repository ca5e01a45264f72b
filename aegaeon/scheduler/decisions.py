"""What a scheduler decided lately, and why: a bounded ring."""

from collections import deque

import msgspec

from aegaeon.types import Action, Handoff, Idle, Load, ModelId, RequestId

MAX_DECISIONS = 4096
GOES_ON = "goes_on"  # the reason of what was decided before and is still right


class Decision(msgspec.Struct, frozen=True):
    """A decision and its reason's code. `times` are how often it was taken in a row, first at
    `at_s` and last at `until_s`, seconds of the scheduler's clock."""

    at_s: float
    until_s: float
    action: str
    model: ModelId | None
    requests: tuple[RequestId, ...]
    evicted: tuple[ModelId, ...]
    reason: str
    times: int


class Decisions:
    """The last ones, oldest first. The same decision again and again is one entry."""

    def __init__(self, most: int = MAX_DECISIONS) -> None:
        self._ring: deque[tuple[float, Action | Load, str]] = deque(maxlen=most)
        self._times: deque[int] = deque(maxlen=most)
        self._last_s: deque[float] = deque(maxlen=most)

    def note(self, now: float, action: Action | Load, reason: str) -> None:
        """Remember that `action` was decided at `now`."""
        if self._ring:
            _, last, last_reason = self._ring[-1]
            if reason in (last_reason, GOES_ON) and _is_same(last, action):
                self._times[-1] += 1
                self._last_s[-1] = now
                return
        self._ring.append((now, action, reason))
        self._times.append(1)
        self._last_s.append(now)

    def recent(self, request: RequestId | None = None) -> tuple[Decision, ...]:
        """Return the decisions remembered, or those of them that concern `request`."""
        found = []
        entries = zip(self._ring, self._times, self._last_s, strict=True)
        for (at_s, action, reason), times, last_s in entries:
            decision = _told(at_s, action, reason, times, last_s)
            if request is None or request in decision.requests:
                found.append(decision)
        return tuple(found)


def _is_same(one: Action | Load, other: Action | Load) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Idle):
        return True
    if isinstance(one, Handoff | Load):
        return False
    return one.model == other.model and _requests(one) == _requests(other)  # type: ignore[union-attr]


def _requests(action: Action | Load) -> tuple[RequestId, ...]:
    if isinstance(action, Handoff):
        return (action.request,)
    if isinstance(action, Load):
        return action.offload + action.bring
    return getattr(action, "requests", ())


def _told(at_s: float, action: Action | Load, reason: str, times: int, last_s: float) -> Decision:
    return Decision(
        at_s,
        last_s,
        type(action).__name__.lower(),
        getattr(action, "model", None),
        _requests(action),
        action.evict if isinstance(action, Load) else (),
        reason,
        times,
    )

"""What a scheduler decided lately, and why: a bounded ring."""

from collections import deque

from aegaeon.explanations import Decision, is_of
from aegaeon.types import Action, Handoff, Idle, Load, ModelId, RequestId, Switch

MAX_DECISIONS = 2048
GOES_ON = "goes_on"  # the reason of what was decided before and is still right


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

    def recent(
        self,
        request: RequestId | None = None,
        model: ModelId | None = None,
        limit: int = MAX_DECISIONS,
    ) -> tuple[Decision, ...]:
        """Return the last `limit` decisions remembered.

        With `request`, of those that concern it, and of those on the weights and turns of `model`.
        """
        found: list[Decision] = []
        entries = zip(
            reversed(self._ring), reversed(self._times), reversed(self._last_s), strict=True
        )
        for (at_s, action, reason), times, last_s in entries:
            if len(found) >= limit:
                break
            if request is None or _concerns(action, request, model):
                found.append(_told(at_s, action, reason, times, last_s))
        return tuple(reversed(found))


def _concerns(action: Action | Load, request: RequestId, model: ModelId | None) -> bool:
    if any(is_of(one, request) for one in _requests(action)):
        return True
    if model is None or not isinstance(action, Switch | Load):
        return False
    return action.model == model or (isinstance(action, Load) and model in action.evict)


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

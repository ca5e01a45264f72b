"""What a scheduler decided lately, and why: a bounded ring."""

from collections import deque
from dataclasses import dataclass

from aegaeon.explanations import Decision, is_of
from aegaeon.types import Action, Handoff, Idle, Load, ModelId, RequestId, Switch

MAX_DECISIONS = 2048
ROUND_S = 1.0
TAKES_TURNS = "takes_turns"  # the reason where models have the device by turns
GOES_ON = "goes_on"  # the reason of what was decided before and is still right


@dataclass(slots=True)
class _Entry:
    """A decision, how often it was taken, first and last."""

    at_s: float
    action: Action | Load
    reason: str
    times: int = 0
    last_s: float = 0.0


class Decisions:
    """The last ones, oldest first. The same decision again and again is one entry; so is, for a
    second, what comes round again while models take turns."""

    def __init__(self, most: int = MAX_DECISIONS) -> None:
        self._ring: deque[_Entry] = deque(maxlen=most)
        self._last: _Entry | None = None  # the one taken last
        self._round: dict[tuple[str, ModelId], _Entry] = {}  # of turns, since `_round_s`
        self._round_s = 0.0

    def note(self, now: float, action: Action | Load, reason: str) -> None:
        """Remember that `action` was decided at `now`."""
        entry = self._again(now, action, reason)
        if entry is None:
            entry = _Entry(now, action, reason)
            self._ring.append(entry)
            if reason == TAKES_TURNS:
                self._round[_name_of(action)] = entry
        entry.times += 1
        entry.last_s = now
        self._last = entry

    def _again(self, now: float, action: Action | Load, reason: str) -> _Entry | None:
        """The entry of the same decision: the last, or one of this second of turns."""
        last = self._last
        if last is None:
            return None
        if reason in (last.reason, GOES_ON) and _is_same(last.action, action):
            return last
        if reason != TAKES_TURNS:
            return None
        if last.reason != TAKES_TURNS or now - self._round_s >= ROUND_S:
            self._round.clear()
            self._round_s = now
        entry = self._round.get(_name_of(action))
        return entry if entry is not None and _is_same(entry.action, action) else None

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
        for entry in reversed(self._ring):
            if len(found) >= limit:
                break
            if request is None or _concerns(entry.action, request, model):
                found.append(_told(entry))
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


def _name_of(action: Action | Load) -> tuple[str, ModelId]:
    return type(action).__name__, getattr(action, "model", "")


def _told(entry: _Entry) -> Decision:
    action = entry.action
    return Decision(
        entry.at_s,
        entry.last_s,
        type(action).__name__.lower(),
        getattr(action, "model", None),
        _requests(action),
        action.evict if isinstance(action, Load) else (),
        entry.reason,
        entry.times,
    )

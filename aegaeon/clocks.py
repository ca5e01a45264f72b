"""Times that go from one machine to another: each has a monotonic clock of its own.

What they share is the clock on the wall, as far as they are told the time (NTP): records that cross
machines say how far that is ahead of their writer's clock.
"""

import time

import msgspec

from aegaeon.explanations import Decision
from aegaeon.types import Request

SAME_S = 0.001  # clocks that differ by less are one; the wall's is corrected a little all the time


def ahead_s() -> float:
    """Return how far the wall's clock is ahead of this machine's monotonic clock."""
    return time.time() - time.monotonic()


def brought_here(request: Request, theirs_s: float | None) -> Request:
    """Return `request` by our clock, written where the wall's was `theirs_s` ahead; None: here."""
    shift_s = _shift_s(theirs_s)
    if not shift_s:
        return request
    return msgspec.structs.replace(
        request,
        arrival_s=request.arrival_s + shift_s,
        deadline_s=request.deadline_s + shift_s,
    )


def brought_there(decisions: tuple[Decision, ...], theirs_s: float | None) -> tuple[Decision, ...]:
    """Return `decisions`, of here, by the clock of whoever asked."""
    shift_s = _shift_s(theirs_s)
    if not shift_s:
        return decisions
    return tuple(
        msgspec.structs.replace(one, at_s=one.at_s - shift_s, until_s=one.until_s - shift_s)
        for one in decisions
    )


def _shift_s(theirs_s: float | None) -> float:
    """What to add to a time of theirs for the same one of ours."""
    if theirs_s is None:
        return 0.0
    shift_s = theirs_s - ahead_s()
    return shift_s if abs(shift_s) >= SAME_S else 0.0

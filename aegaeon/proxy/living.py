"""Which open requests live at which life of an instance, and which of them have gone silent."""

import time
from collections.abc import Iterable, Iterator, Mapping, Set

from aegaeon.deaths import Confirm
from aegaeon.errors import DeadlineExceeded
from aegaeon.proxy.generation import OpenRequest
from aegaeon.proxy.outbox import Target
from aegaeon.types import ModelId, RequestId

SILENCE_S = 10.0  # of a request, before its instance is asked whether it still has it
LOOK_S = 1.0  # between looks
MAX_CONFIRMED = 4096  # of one message


class Living:
    """The requests by where they live, which is their `target`. Owned by the gateway."""

    def __init__(self) -> None:
        self._at: dict[Target, dict[RequestId, OpenRequest]] = {}
        self._looked_s = float("-inf")

    @property
    def targets(self) -> Set[Target]:
        """Where any request lives."""
        return self._at.keys()

    def at(self, target: Target) -> tuple[OpenRequest, ...]:
        """Return the requests that live there."""
        return tuple(self._at.get(target, {}).values())

    def silent(self, now: float, reply_to: str) -> Iterator[tuple[Target, Confirm]]:
        """Yield, every LOOK_S, what to ask whom of requests of which nothing has been heard for
        long. Mostly they wait there; one whose proxy took nothing for a while has been given up."""
        if now - self._looked_s < LOOK_S:
            return
        self._looked_s = now
        for target, here in self._at.items():
            silent = [one for one in here.values() if one.is_silent(now, SILENCE_S)]
            for first in range(0, len(silent), MAX_CONFIRMED):
                attempts = ((one.id, one.attempt) for one in silent[first : first + MAX_CONFIRMED])
                yield target, Confirm(tuple(attempts), reply_to)

    def attach(self, opened: OpenRequest, target: Target) -> None:
        """Put the request on the list of the instance where it lives."""
        opened.target = target
        self._at.setdefault(target, {})[opened.id] = opened

    def detach(self, opened: OpenRequest) -> Target | None:
        """Take the request off its instance's list and return that instance's life."""
        target = opened.target
        if target is None:
            return None
        opened.target = None
        rest = self._at[target]
        del rest[opened.id]
        if not rest:
            del self._at[target]
        return target


async def end_overdue(opened: Mapping[RequestId, OpenRequest]) -> None:
    """Fail what is over; apart from the store, which may not answer for a while."""
    now = time.monotonic()
    for one in tuple(opened.values()):
        if now >= one.deadline_s:
            one.fail(DeadlineExceeded("the request's time is over"))


def waits(opened: Iterable[OpenRequest], now: float) -> dict[ModelId, tuple[int, float]]:
    """Return how many of `opened` are of each model, and how long one without tokens has waited."""
    found: dict[ModelId, tuple[int, float]] = {}
    for one in opened:
        model = one.generation.model
        count, oldest_s = found.get(model, (0, 0.0))
        wait_s = 0.0 if one.has_tokens else now - one.arrival_s
        found[model] = count + 1, max(oldest_s, wait_s)
    return found

"""Deadlines of requests, the next one first; those of ended requests are passed over."""

import heapq
from collections.abc import Collection

from aegaeon.types import RequestId


class Deadlines:
    """A heap with left-overs of ended requests, which never outgrow the living ones for long."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, RequestId]] = []

    def add(self, request: RequestId, deadline_s: float) -> None:
        """Watch the deadline of `request`."""
        heapq.heappush(self._heap, (deadline_s, request))

    def expired(self, now: float, alive: Collection[RequestId]) -> tuple[RequestId, ...]:
        """Return, once, those of `alive` whose deadline is not after `now`."""
        expired: list[RequestId] = []
        while self._heap and self._heap[0][0] <= now:
            request = heapq.heappop(self._heap)[1]
            if request in alive:
                expired.append(request)
        if len(self._heap) > 2 * len(alive) + 64:
            self._heap = [deadline for deadline in self._heap if deadline[1] in alive]
            heapq.heapify(self._heap)
        return tuple(expired)

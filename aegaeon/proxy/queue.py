"""How much may be open at a proxy: requests, bytes of their prompts, and for how long."""

import msgspec

from aegaeon.config import Settings
from aegaeon.errors import QueueFull
from aegaeon.proxy.generation import Generation
from aegaeon.specs import Bounds

# Of all room, the part that no key gets beyond its share: who comes behind a flood finds some.
RESERVE = 1 / 8
# Of that, the part for keys that have nothing open.
NEWCOMERS = 1 / 4


class _Held(msgspec.Struct):
    """What one key has open."""

    weight: float
    requests: int = 0
    bytes: int = 0


class Queue:
    """The bounds, and what of them is taken. Owned by the gateway.

    Within the last RESERVE of the room a key takes no more than its share: by its weight, among
    the keys that have something open. Whoever asks without a key shares with nobody.
    """

    def __init__(self, settings: Settings) -> None:
        self._max_open = settings.max_waiting * settings.prefilling_count
        self._max_open_mb = settings.max_open_mb
        self._open = 0
        self._bytes = 0  # of the prompts of those that are open
        self._held: dict[str, _Held] = {}  # by key, of those that have something open
        self.request_timeout_s = settings.request_timeout_s

    def bound(self, bounds: Bounds) -> None:
        """Go by other bounds from here on; requests that are open keep their deadlines."""
        self._max_open_mb = bounds.max_open_mb
        self.request_timeout_s = bounds.request_timeout_s

    def enter(self, generation: Generation) -> None:
        """Count one more. Raises QueueFull; one alone is never too much."""
        if self._open >= self._max_open:
            raise QueueFull(f"{self._max_open} requests are open; try again later")
        total = self._bytes + generation.held_bytes
        if self._open and total > self._max_open_mb * 1e6:
            raise QueueFull(
                f"prompts of {self._max_open_mb:g} MB, all there may be, are open; try again later"
            )
        held = self._held.get(generation.key)
        if held is None:
            held = _Held(generation.weight)
        elif generation.key:
            held.weight = generation.weight
            self._check_share(held, generation.held_bytes)
        self._held[generation.key] = held
        held.requests += 1
        held.bytes += generation.held_bytes
        self._open += 1
        self._bytes = total

    def leave(self, generation: Generation) -> None:
        """Count one less."""
        held = self._held[generation.key]
        held.requests -= 1
        held.bytes -= generation.held_bytes
        if not held.requests:
            del self._held[generation.key]
        self._open -= 1
        self._bytes -= generation.held_bytes

    def _check_share(self, held: _Held, more: int) -> None:
        """Raise QueueFull where a key that has `held` open takes room that is for others."""
        share = held.weight / sum(one.weight for one in self._held.values())
        # Of few requests there is no part to set aside, or just one.
        reserve = int(self._max_open * RESERVE)
        kept = min(reserve, max(1, int(reserve * NEWCOMERS)))
        room, most = self._max_open - reserve, self._max_open - kept
        total = self._open + 1
        if total > most or (total > room and held.requests + 1 > room * share):
            raise QueueFull(
                f"this key has {held.requests} requests open, and the room that is left is for "
                "other keys; try again later"
            )
        limit = self._max_open_mb * 1e6
        room_bytes, total_bytes = limit * (1 - RESERVE), self._bytes + more
        is_over = total_bytes > room_bytes and held.bytes + more > room_bytes * share
        if is_over or total_bytes > limit * (1 - RESERVE * NEWCOMERS):
            raise QueueFull(
                f"this key has prompts of {held.bytes / 1e6:g} MB open, and the room that is left "
                "is for other keys; try again later"
            )

"""How much may be open at a proxy: requests, bytes of their prompts, and for how long."""

from aegaeon.config import Settings
from aegaeon.errors import QueueFull
from aegaeon.proxy.generation import Generation
from aegaeon.specs import Bounds


class Queue:
    """The bounds, and what of them is taken. Owned by the gateway."""

    def __init__(self, settings: Settings) -> None:
        self._max_open = settings.max_waiting * settings.prefilling_count
        self._max_open_mb = settings.max_open_mb
        self._open = 0
        self._bytes = 0  # of the prompts of those that are open
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
        self._open += 1
        self._bytes = total

    def leave(self, generation: Generation) -> None:
        """Count one less."""
        self._open -= 1
        self._bytes -= generation.held_bytes

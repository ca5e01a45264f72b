"""What the node's weight cache holds and threw out, and why, as one process tells of it."""

import logging
import os
import time

from aegaeon._native import WeightCache
from aegaeon.errors import RegionError
from aegaeon.types import ModelId

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between looks at what the cache holds


class EvictionLog:
    """Logs each eviction of the cache once in this process, and counts those of its own making."""

    def __init__(self, cache: WeightCache) -> None:
        """Begin with what is evicted from now on."""
        self._cache = cache
        evictions = cache.evictions()
        self._next = evictions[-1].number + 1 if evictions else 0
        self._counts: dict[ModelId, dict[str, int]] = {}
        self._held: tuple[ModelId, ...] = ()
        self._coming: dict[ModelId, float] = {}
        self._looked_s = float("-inf")

    @property
    def counts(self) -> dict[ModelId, dict[str, int]]:
        """Evictions that this process asked for, by model and reason: `room` or `asked_for`."""
        return self._counts

    @property
    def held(self) -> tuple[ModelId, ...]:
        """The models that the cache held whole when `look` was called last."""
        return self._held

    @property
    def coming(self) -> dict[ModelId, float]:
        """Of the models that came in when `look` was called last, the share that was in."""
        return self._coming

    def look(self) -> None:
        """See what the cache holds, at most once in LOOK_S. A stopped process may hold its lock, so
        this is not for a thread that others wait for."""
        now = time.monotonic()
        if now - self._looked_s < LOOK_S:
            return
        self._looked_s = now
        try:
            entries = self._cache.status()
        except RegionError:
            return  # closed, or the lock was not to be had
        self._held = tuple(sorted(one.model for one in entries if one.state == "ready"))
        self._coming = {
            one.model: round(one.stages_done / one.stages, 2)
            for one in entries
            if one.state != "ready" and one.stages
        }

    def forget(self) -> None:
        """Look again with the next `look`: what is held has changed."""
        self._looked_s = float("-inf")

    def write(self) -> None:
        """Log what is new."""
        new = [one for one in self._cache.evictions() if one.number >= self._next]
        for one in new:
            self._next = one.number + 1
            if one.pid == os.getpid():
                reason = "room" if one.reason.startswith("room for ") else "asked_for"
                # A new one each time: others may be looking at it.
                before = self._counts.get(one.model, {})
                self._counts = {
                    **self._counts,
                    one.model: {**before, reason: before.get(reason, 0) + 1},
                }
            log.info(
                "weights evicted model=%s bytes=%d reason=%r pid=%d",
                one.model, one.size_bytes, one.reason, one.pid,
            )  # fmt: skip

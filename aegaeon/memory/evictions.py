"""What the node's weight cache threw out, and why, for the log of one process."""

import logging

from aegaeon._native import WeightCache

log = logging.getLogger(__name__)


class EvictionLog:
    """Logs each eviction of the cache once in this process."""

    def __init__(self, cache: WeightCache) -> None:
        """Begin with what is evicted from now on."""
        self._cache = cache
        evictions = cache.evictions()
        self._next = evictions[-1].number + 1 if evictions else 0

    def write(self) -> None:
        """Log what is new."""
        new = [one for one in self._cache.evictions() if one.number >= self._next]
        for one in new:
            self._next = one.number + 1
            log.info(
                "weights evicted model=%s bytes=%d reason=%r pid=%d",
                one.model, one.size_bytes, one.reason, one.pid,
            )  # fmt: skip

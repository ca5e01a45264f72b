"""How much of a device's time its models take: by it models are placed, and newcomers served."""

import math

RECENT_S = 20.0  # of arrivals that count
MEMORY_WEIGHT = 0.2  # of a device full of weights, against one whose time is all taken
IDLE = 0.8  # below it, newcomers need not wait for turns to end


class Busyness:
    """Shares of a device's time, 1 being all of it, that decoding in time takes, and prefilling
    what came lately; and, for less, of its memory."""

    def __init__(self) -> None:
        """Begin with nothing to do."""
        self.decode = 0.0
        self.total = 0.0
        self._prefill = 0.0
        self._prefill_s = 0.0  # when it was that
        self._memory = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether there is time to spare."""
        return self.total < IDLE

    def hold(self, memory_share: float) -> float:
        """A model wants so much of the memory, or, where negative, no more. Returns the share."""
        self._memory += MEMORY_WEIGHT * memory_share
        return memory_share

    def sum_up(self, now: float, prefill_s: float = 0.0) -> None:
        """`prefill_s` of prefilling have come or, where negative, need not be done; what came long
        ago counts no longer."""
        decay = math.exp((self._prefill_s - now) / RECENT_S)
        self._prefill = max(0.0, self._prefill * decay + prefill_s / RECENT_S)
        self._prefill_s = now
        self.total = self.decode + self._prefill + self._memory

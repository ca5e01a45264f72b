"""Whether the compute lane has come to a stand, as its loop sees it: pure, time comes in."""


class Watchdog:
    """Owned by one runtime. After `limit_s` without progress of what the lane does it is stuck;
    with 0 it never is."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._progress: object = None
        self._since_s = 0.0

    def is_stuck(self, is_busy: bool, progress: object, now: float) -> bool:
        """Say whether it is. `progress` is another one whenever something has been done."""
        if not is_busy or progress != self._progress:
            self._progress = progress
            self._since_s = now
        return self._limit_s > 0 and now - self._since_s >= self._limit_s

"""What a sender keeps of what a server has acknowledged, to say it again to one that lacks it."""

import time
from collections import deque
from typing import NamedTuple

KEPT_BYTES = 1 << 20
# Longer than a replica may be behind, or a file system behind `appendfsync everysec`, and than
# Sentinels take to promote one.
KEPT_S = 60.0


class Kept(NamedTuple):
    """A record, its number and that of the one before."""

    before: int
    sequence: int
    record: bytes


class KeptRecords:
    """The last records of one sender, the oldest first: as many as there is room for, so that
    nothing that a server took back in KEPT_S is lost unless it was more than KEPT_BYTES."""

    def __init__(self) -> None:
        self.last = 0  # number of the last record that was acknowledged
        self._records: deque[tuple[Kept, float]] = deque()
        self._held_bytes = 0

    def keep(self, sequence: int, record: bytes) -> None:
        """Note that the record has been acknowledged."""
        now = time.monotonic()
        self._records.append((Kept(self.last, sequence, record), now))
        self._held_bytes += len(record)
        self.last = sequence
        while len(self._records) > 1 and (
            self._held_bytes > KEPT_BYTES or self._records[0][1] < now - KEPT_S
        ):
            self._held_bytes -= len(self._records.popleft()[0].record)

    def behind(self, sequence: int) -> list[Kept]:
        """Return what is kept of the records behind that one."""
        return [kept for kept, _ in self._records if kept.sequence > sequence]

    def forget(self) -> None:
        """Nobody reads them any more."""
        self._records.clear()
        self._held_bytes = 0

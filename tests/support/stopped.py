"""A process that lives and does nothing, and words of shared memory that claim to be its own."""

import mmap
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HEADER_BYTES = 4096  # of a region; the lock is the first word behind it


@contextmanager
def stopped_owner() -> Iterator[int]:
    """Yield what the lock of a region holds while the stopped process has it."""
    process = subprocess.Popen(["sleep", "1000"])
    try:
        process.send_signal(signal.SIGSTOP)
        stat = Path(f"/proc/{process.pid}/stat").read_text()
        start_ticks = int(stat.rsplit(") ", 1)[1].split()[19])
        yield process.pid << 42 | (start_ticks & ((1 << 41) - 1)) << 1
    finally:
        process.kill()
        process.wait()


class Words:
    """The words of a file, 64 bits each; each is written whole, for others look at any moment."""

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:  # noqa: PTH123
            self.bytes = mmap.mmap(file.fileno(), 0)
        self._words = memoryview(self.bytes).cast("Q")

    def __getitem__(self, offset: int) -> int:
        return self._words[offset // 8]

    def __setitem__(self, offset: int, value: int) -> None:
        self._words[offset // 8] = value

    def find(self, value: int) -> list[int]:
        """Return the offsets of the words that are `value`."""
        return [8 * at for at, word in enumerate(self._words) if word == value]


@contextmanager
def lock_held(path: str) -> Iterator[Words]:
    """Have a stopped process hold the lock of the region at `path` meanwhile."""
    words = Words(path)
    with stopped_owner() as owner:
        words[HEADER_BYTES] = owner
        try:
            yield words
        finally:
            words[HEADER_BYTES] = 0

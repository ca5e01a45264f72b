"""The board of one node: two files for each name in shared memory, written in turns.

Each holds a record behind its number, length and checksum. A writer that is killed while it writes
spoils one; the other has the record before. Nobody waits for anybody.
"""

import fcntl
import os
import struct
import zlib
from contextlib import ExitStack, suppress
from pathlib import Path

from aegaeon.errors import RegionError
from aegaeon.store.base import Board, Join
from aegaeon.store.names import BOARDS, SHARED_MEMORY, check_name, region_path

MAGIC = b"aegboar1"
_HEADER = struct.Struct("<8sQQI")  # magic, number of the record, its length, its checksum
_NOTHING = (0, b"")
LOOKS = 10


class _Writer:
    """The two files of a name, kept open: a domain that was removed meanwhile stays removed."""

    def __init__(self, paths: list[Path]) -> None:
        """Go on behind what stands there. Raises OSError."""
        numbers = [found[0] if (found := _read(path)) else 0 for path in paths]
        self._number = max(numbers)
        self._turn = numbers.index(min(numbers))
        self._files: list[int] = []
        try:
            for path in paths:
                flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                self._files.append(os.open(path, flags, 0o600))
            with suppress(BlockingIOError):
                # Until the end of this process or its own: by which others know that it lives.
                fcntl.flock(self._files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise

    def write(self, record: bytes) -> None:
        """Replace the older of the two. Raises OSError."""
        self._number += 1
        header = _HEADER.pack(MAGIC, self._number, len(record), zlib.crc32(record))
        if os.pwrite(self._files[self._turn], header + record, 0) < len(header) + len(record):
            raise OSError("no room for all of it")
        self._turn = 1 - self._turn

    def close(self) -> None:
        """Close both."""
        while self._files:
            os.close(self._files.pop())


class FileBoard(Board):
    """The files of the board of `domain` in `directory`."""

    def __init__(self, domain: str, directory: Path = SHARED_MEMORY) -> None:
        """Opens nothing yet."""
        self._domain = domain
        self._directory = directory
        self._writers: dict[str, _Writer] = {}

    def publish(self, name: str, record: bytes) -> None:
        """See Board."""
        check_name("record", name)
        try:
            writer = self._writers.get(name)
            if writer is None:
                writer = self._writers[name] = _Writer(self._paths(name))
            writer.write(record)
        except OSError as error:
            raise self._no_room(record, error) from None

    def read(self) -> dict[str, bytes]:
        """See Board."""
        names = {
            path.name.rpartition("+")[2]
            for kind in BOARDS
            for path in self._directory.glob(f"aegaeon-{self._domain}.{kind}+*")
        }
        last = {name: _last(self._paths(name)) for name in sorted(names)}
        return {name: record for name, record in last.items() if record is not None}

    def fold(self, name: str, into: str, join: Join) -> bool:
        """See Board. A writer has ended when the kernel has dropped its lock."""
        ended, joined = self._paths(check_name("record", name)), self._paths(into)
        record = b""
        try:
            with ExitStack() as held:
                descriptor = _locked(ended[0], os.O_RDWR, held)
                if descriptor is None or not os.fstat(descriptor).st_nlink:
                    return False
                if _locked(joined[0], os.O_RDWR | os.O_CREAT, held) is None:
                    return False  # somebody else folds
                last = _last(ended)
                if last is not None:
                    record = join(_last(joined), last)
                    writer = _Writer(joined)
                    held.callback(writer.close)
                    writer.write(record)
                # In this order: who reads both is to know from `into` that it has the other.
                for path in ended:
                    path.unlink(missing_ok=True)
                return last is not None
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._no_room(record, error) from None

    def close(self) -> None:
        """See Board."""
        while self._writers:
            self._writers.popitem()[1].close()

    def _paths(self, name: str) -> list[Path]:
        return [region_path(self._directory, self._domain, kind, name) for kind in BOARDS]

    def _no_room(self, record: bytes, error: OSError) -> RegionError:
        return RegionError(
            f"cannot publish {len(record)} bytes in {self._directory} ({error}); free memory "
            "there or make it larger"
        )


def _locked(path: Path, flags: int, held: ExitStack) -> int | None:
    """Open a file and keep others from locking it as long as it is `held`; None where somebody
    does so already. Raises OSError."""
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    return descriptor


def _last(paths: list[Path]) -> bytes | None:
    """Return the newest record of the two.

    Where one is not whole it is being written, and the other may have been overtaken twice while it
    was read: both are read again, so that nobody sees time go back. What a killed writer has
    spoiled stays so.
    """
    found: list[tuple[int, bytes] | None] = []
    for _ in range(LOOKS):
        found = [_read(path) for path in paths]
        if None not in found:
            break
    number, record = max(one or _NOTHING for one in found)
    return record if number else None


def _read(path: Path) -> tuple[int, bytes] | None:
    """Return number and record, 0 where nothing was ever written, or None where it is not whole."""
    data = b""
    with suppress(OSError):
        data = path.read_bytes()
    if not data:
        return _NOTHING
    if len(data) < _HEADER.size:
        return None
    magic, number, length, checksum = _HEADER.unpack_from(data)
    record = data[_HEADER.size : _HEADER.size + length]
    if magic != MAGIC or len(record) != length or zlib.crc32(record) != checksum:
        return None
    return number, record

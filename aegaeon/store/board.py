"""The board of one node: two files for each name in shared memory, written in turns.

Each holds a record behind its number, length and checksum. A writer that is killed while it writes
spoils one; the other has the record before. Nobody waits for anybody.
"""

import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path

from aegaeon.errors import RegionError
from aegaeon.store.base import Board
from aegaeon.store.names import BOARDS, SHARED_MEMORY, check_name, region_path

MAGIC = b"aegboar1"
_HEADER = struct.Struct("<8sQQI")  # magic, number of the record, its length, its checksum


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
                paths = [region_path(self._directory, self._domain, x, name) for x in BOARDS]
                writer = self._writers[name] = _Writer(paths)
            writer.write(record)
        except OSError as error:
            raise RegionError(
                f"cannot publish {len(record)} bytes in {self._directory} ({error}); free memory "
                "there or make it larger"
            ) from None

    def read(self) -> dict[str, bytes]:
        """See Board."""
        last: dict[str, tuple[int, bytes]] = {}
        for kind in BOARDS:
            for path in self._directory.glob(f"aegaeon-{self._domain}.{kind}+*"):
                name = path.name.rpartition("+")[2]
                found = _read(path)
                if found is not None and found[0] > last.get(name, (0, b""))[0]:
                    last[name] = found
        return {name: record for name, (_, record) in sorted(last.items())}

    def close(self) -> None:
        """See Board."""
        while self._writers:
            self._writers.popitem()[1].close()


def _read(path: Path) -> tuple[int, bytes] | None:
    """Return number and record, or None where there is no whole one."""
    data = b""
    with suppress(OSError):
        data = path.read_bytes()
    if len(data) < _HEADER.size:
        return None
    magic, number, length, checksum = _HEADER.unpack_from(data)
    record = data[_HEADER.size : _HEADER.size + length]
    if magic != MAGIC or len(record) != length or zlib.crc32(record) != checksum:
        return None
    return number, record

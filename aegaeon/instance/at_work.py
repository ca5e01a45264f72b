"""What this instance is doing, noted in memory that outlives it: its supervisor's, by a descriptor.

To note is a copy of some bytes; nobody is waited for, and no other process is asked.
"""

import mmap
import os
import struct
import zlib
from contextlib import suppress

import msgspec

from aegaeon.deaths import NO_WORK, Work, decode_work, encode_work
from aegaeon.errors import RegionMismatch
from aegaeon.types import ModelId, RequestId

# Two slots, written in turns: who dies while it writes leaves the one before.
SLOT_BYTES = 1 << 18  # ids of thousands of requests; what is never written takes no memory
_HEADER = struct.Struct("<QII")  # number of the note, its length, its checksum


class AtWork:
    """Owned by one runtime, whose loop alone calls the verbs. Without a descriptor nothing is kept.

    A step of the requests of the step before changes nothing and so costs nothing.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        """Note in the file of `descriptor`, which is made by `memory` and may be closed then."""
        self._memory = None if descriptor is None else mmap.mmap(descriptor, 2 * SLOT_BYTES)
        self._number = 0
        self.work = NO_WORK

    def compute(self, model: ModelId, requests: tuple[RequestId, ...]) -> None:
        """The compute lane begins an action."""
        if self.work.model != model or self.work.requests != requests:
            self._note(msgspec.structs.replace(self.work, model=model, requests=requests))

    def rest(self) -> None:
        """The compute lane has nothing to do."""
        if self.work.model is not None:
            self._note(msgspec.structs.replace(self.work, model=None, requests=()))

    def load(self, model: ModelId | None) -> None:
        """The copy lane begins to bring a model in, or has ended."""
        self._note(msgspec.structs.replace(self.work, loading=model))

    def take(self, request: RequestId | None) -> None:
        """The loop begins to take a request in, or has ended."""
        self._note(msgspec.structs.replace(self.work, taking=request))

    def _note(self, work: Work) -> None:
        self.work = work
        if self._memory is None:
            return
        record = encode_work(work)
        if len(record) > SLOT_BYTES - _HEADER.size:
            record = b""  # nobody can say then
        self._number += 1
        start = self._number % 2 * SLOT_BYTES
        header = _HEADER.pack(self._number, len(record), zlib.crc32(record))
        self._memory[start : start + len(header) + len(record)] = header + record


def memory() -> int:
    """Return a descriptor of memory to note in, which the caller closes. Raises OSError."""
    descriptor = os.memfd_create("aegaeon-at-work")
    try:
        os.ftruncate(descriptor, 2 * SLOT_BYTES)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def last_work(descriptor: int) -> Work | None:
    """Return what was noted last; NO_WORK where nothing ever was, None where nobody can say."""
    found = []
    for slot in range(2):
        header = os.pread(descriptor, _HEADER.size, slot * SLOT_BYTES)
        number, length, checksum = _HEADER.unpack(header)
        record = os.pread(descriptor, length, slot * SLOT_BYTES + _HEADER.size)
        if number and zlib.crc32(record) == checksum:
            found.append((number, record))
    if not found:
        return NO_WORK
    with suppress(RegionMismatch):
        return decode_work(max(found)[1])
    return None

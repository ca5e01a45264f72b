"""The files of a model while they come: written by chunks, in any order, by several threads."""

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from aegaeon.errors import CannotStore, TransferError
from aegaeon.transfer.digests import read_at
from aegaeon.transfer.manifest import DIGEST_BYTES, Chunk, HeldFile


class Damaged(TransferError):
    """Bytes that are not those of the digest."""


class Storing:
    """Files of `directory`, which other files leave. What an earlier fetch left counts, chunk by
    chunk, if its digest is right: there is no record that could be wrong. Raises CannotStore."""

    def __init__(self, directory: Path, files: Sequence[HeldFile]) -> None:
        """Open all of `files`, at their sizes."""
        self._directory = directory
        self._handles: dict[str, int] = {}
        self._had_bytes: dict[str, int] = {}
        self._digests = {file.name: bytearray(file.chunks * DIGEST_BYTES) for file in files}
        try:
            with storing(directory):
                self._check_room(files)
                for file in files:
                    self._open(file)
        except BaseException:
            self.close()
            raise

    @property
    def digests(self) -> dict[str, bytes]:
        """The digests of all chunks by file, once all are here."""
        return {name: bytes(digests) for name, digests in self._digests.items()}

    def has(self, chunk: Chunk, view: memoryview) -> bool:
        """Whether `chunk` is here and right; `view` is where it is read to."""
        if not chunk.digest or chunk.offset >= self._had_bytes[chunk.file]:
            return False
        with storing(self._directory):
            handle = self._handles[chunk.file]
            if _is_hole(handle, chunk.offset, chunk.chunk_bytes):
                return False
            if read_at(handle, view, chunk.offset) != chunk.chunk_bytes:
                return False
        if hashlib.sha256(view).digest() != chunk.digest:
            return False
        self._note(chunk, chunk.digest)
        return True

    def put(self, chunk: Chunk, view: memoryview) -> None:
        """Write `view` as `chunk`. Raises Damaged if it is not that, CannotStore."""
        digest = hashlib.sha256(view).digest()
        if chunk.digest and digest != chunk.digest:
            raise Damaged(f"a part of {chunk.file!r} came damaged")
        with storing(self._directory):
            done = 0
            while done < len(view):
                done += os.pwrite(self._handles[chunk.file], view[done:], chunk.offset + done)
        self._note(chunk, digest)

    def sync(self) -> None:
        """Have all on the disk, so that no power failure leaves a model with holes."""
        with storing(self._directory):
            for handle in self._handles.values():
                os.fsync(handle)

    def close(self) -> None:
        """Close the files; what came stays for another fetch."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles = {}

    def _open(self, file: HeldFile) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        handle = os.open(self._directory / file.name, flags, 0o644)
        self._handles[file.name] = handle
        self._had_bytes[file.name] = os.fstat(handle).st_size
        os.ftruncate(handle, file.file_bytes)

    def _check_room(self, files: Sequence[HeldFile]) -> None:
        """Tell before hours of fetching, not after, that it does not fit."""
        missing = 0
        for file in files:
            path = self._directory / file.name
            taken = path.stat().st_blocks * 512 if path.exists() else 0
            missing += max(0, file.file_bytes - taken)
        status = os.statvfs(self._directory)
        free = status.f_bavail * status.f_frsize
        if missing > free:
            raise CannotStore(
                f"{missing / 1e9:.3f} GB are to come, {free / 1e9:.3f} GB are free in "
                f"{self._directory.parent}; free some or take another --models-dir"
            )

    def _note(self, chunk: Chunk, digest: bytes) -> None:
        begin = chunk.index * DIGEST_BYTES
        self._digests[chunk.file][begin : begin + DIGEST_BYTES] = digest


@contextmanager
def storing(directory: Path) -> Iterator[None]:
    """Raise CannotStore for what the disk of `directory` does not do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CannotStore(
                f"no room is left in {directory.parent}; free some, then fetch again: what came "
                "stays"
            ) from None
        raise CannotStore(
            f"cannot write in {directory} ({error.strerror}); check the disk and its rights"
        ) from None


def _is_hole(handle: int, offset: int, size: int) -> bool:
    """Whether nothing was ever written there, as far as the file system tells."""
    try:
        return os.lseek(handle, offset, os.SEEK_DATA) >= offset + size
    except OSError as error:
        return error.errno == errno.ENXIO  # no data from there to the end

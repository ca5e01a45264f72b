"""Digests of the files of a model directory: computed once, and kept beside them."""

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from aegaeon.errors import TransferError
from aegaeon.models.safetensors import FileVersion
from aegaeon.transfer.manifest import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    MAX_MANIFEST_BYTES,
    Chunk,
    HeldFile,
    Manifest,
    chunks_of,
    files_of,
)

KEPT = ".digests"  # in the model's directory; not one of the files that go with it
MAX_THREADS = 8
Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Digested(msgspec.Struct, frozen=True):
    """The digests of files of these versions."""

    versions: dict[str, FileVersion]
    manifest: Manifest


def kept(directory: Path) -> Digested | None:
    """Return the digests kept in `directory` if they are of the files there. Raises TransferError,
    CheckpointError where these cannot be read."""
    try:
        with (directory / KEPT).open("rb") as file:
            found = msgspec.msgpack.decode(file.read(MAX_MANIFEST_BYTES), type=Digested)
    except (OSError, msgspec.DecodeError, RecursionError):
        return None
    versions = files_of(directory)
    is_whole = all(len(file.digests) == file.chunks * DIGEST_BYTES for file in found.manifest.files)
    sizes = {file.name: file.file_bytes for file in found.manifest.files}
    same = found.versions == versions and sizes == {name: v[0] for name, v in versions.items()}
    return found if same and is_whole else None


def keep(directory: Path, digested: Digested) -> None:
    """Keep digests for those who ask later; where none can be written they are computed again."""
    with suppress(OSError):
        handle, name = tempfile.mkstemp(dir=directory, prefix=KEPT)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.msgpack.encode(digested))
            os.replace(name, directory / KEPT)  # noqa: PTH105
        except OSError:
            os.unlink(name)  # noqa: PTH108


def digest_directory(directory: Path, progress: Progress, stop: threading.Event) -> Digested:
    """Return the digests of the model in `directory`, kept ones if there are.

    Reads at the speed of the disk or of up to MAX_THREADS cores. Raises TransferError when the
    files change meanwhile, cannot be read, or `stop` is set; CheckpointError.
    """
    if (found := kept(directory)) is not None:
        return found
    versions = files_of(directory)
    files = [HeldFile(name, version[0]) for name, version in versions.items()]
    total_bytes, done = sum(file.file_bytes for file in files), _Count()

    def digest(path: Path, chunk: Chunk) -> bytes:
        if stop.is_set():
            raise TransferError("the digests are not wanted any more")
        answer = _digest_chunk(path, chunk)
        progress(done.add(chunk.chunk_bytes), total_bytes)
        return answer

    full = []
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        for file in files:
            digests = pool.map(partial(digest, directory / file.name), chunks_of(file))
            full.append(msgspec.structs.replace(file, digests=b"".join(digests)))
    if files_of(directory) != versions:
        raise TransferError(f"{directory} changes while it is read; ask again later")
    digested = Digested(versions, Manifest(tuple(full)))
    keep(directory, digested)
    return digested


def read_at(handle: int, view: memoryview, offset: int) -> int:
    """Fill `view` from `offset` of an open file on; return the bytes that are there."""
    got = 0
    while got < len(view) and (part := os.preadv(handle, [view[got:]], offset + got)):
        got += part
    return got


def digested_of(directory: Path, digests: Mapping[str, bytes]) -> Digested:
    """Return what is known of files just written to `directory`, from the digests by name."""
    versions = files_of(directory)
    files = tuple(HeldFile(name, v[0], digests[name]) for name, v in versions.items())
    return Digested(versions, Manifest(files))


class _Count:
    def __init__(self) -> None:
        self._lock, self._total = threading.Lock(), 0

    def add(self, more: int) -> int:
        with self._lock:
            self._total += more
            return self._total


def _digest_chunk(path: Path, chunk: Chunk) -> bytes:
    buffer = memoryview(bytearray(min(CHUNK_BYTES, chunk.chunk_bytes)))
    try:
        with path.open("rb", buffering=0) as file:
            if read_at(file.fileno(), buffer, chunk.offset) != chunk.chunk_bytes:
                raise TransferError(f"{path} was cut off while it was read; ask again later")
    except OSError as error:
        raise TransferError(f"cannot read {path} ({error.strerror}); check the disk") from None
    return hashlib.sha256(buffer).digest()

"""What a model directory holds, as it goes between nodes: names, sizes and a digest per chunk.

SHA-256 of hashlib: 1.8 GB/s on a core with its instructions, twice blake2b, and chunks are digested
on several cores at once. (BLAKE3 is 2.5 times as fast, and would be one more dependency.)
"""

import hashlib
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from aegaeon.errors import TransferError
from aegaeon.models.hub_ids import DESCRIBING_FILES, WEIGHT_FILES
from aegaeon.models.safetensors import FileVersion, version_of

# Large enough that asking for one costs nothing, small enough that one anew costs little.
CHUNK_BYTES = 8 << 20
DIGEST_BYTES = 32
MAX_FILES = 512  # all are open while they are written
MAX_MODEL_BYTES = 1 << 43
MAX_NAME_BYTES = 255
MAX_MANIFEST_BYTES = 64 << 20  # the digests of the largest model, and names


class HeldFile(msgspec.Struct, frozen=True):
    """A file of a model. `digests` are those of its chunks, end to end, or empty where unknown."""

    name: str
    file_bytes: int
    digests: bytes = b""

    @property
    def chunks(self) -> int:
        """How many chunks it has; the last may be short."""
        return -(-self.file_bytes // CHUNK_BYTES)

    @property
    def is_weights(self) -> bool:
        """Whether it holds tensors, and does not only describe them."""
        return _matches(self.name, WEIGHT_FILES)


class Chunk(msgspec.Struct, frozen=True):
    """A part of a file, and its digest (empty: unknown)."""

    file: str
    index: int
    chunk_bytes: int
    digest: bytes

    @property
    def offset(self) -> int:
        """Where in its file it begins."""
        return self.index * CHUNK_BYTES


class Manifest(msgspec.Struct, frozen=True, tag=True):
    """The files of a model, by name."""

    files: tuple[HeldFile, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.file_bytes for file in self.files)

    @property
    def digest(self) -> str:
        """What tells this content from any other, as 64 hexadecimal digits."""
        return hashlib.sha256(msgspec.msgpack.encode(self.files)).hexdigest()


def chunk_at(file: HeldFile, index: int) -> Chunk:
    """Return the chunk of `file` with this index, which there must be."""
    return Chunk(
        file.name,
        index,
        min(CHUNK_BYTES, file.file_bytes - index * CHUNK_BYTES),
        file.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES],
    )


def chunks_of(file: HeldFile) -> list[Chunk]:
    """Return the chunks of `file`, in order."""
    return [chunk_at(file, index) for index in range(file.chunks)]


def check(manifest: Manifest) -> Manifest:
    """Return what another node said, if it can be true and harms nothing. Raises TransferError."""
    if not 0 < len(manifest.files) <= MAX_FILES:
        raise TransferError(f"a model of {len(manifest.files)} files; take one of 1 to {MAX_FILES}")
    seen: set[str] = set()
    total_bytes = 0
    for file in manifest.files:
        name = file.name[:MAX_NAME_BYTES]
        if not is_shared(file.name) or file.name in seen:
            raise TransferError(f"a model with a file {name!r}, which no model may have, or twice")
        seen.add(file.name)
        total_bytes += file.file_bytes
        if file.file_bytes < 0 or total_bytes > MAX_MODEL_BYTES:
            raise TransferError(f"{name!r} of a model is said to take {file.file_bytes} bytes")
        if len(file.digests) != file.chunks * DIGEST_BYTES:
            raise TransferError(f"{name!r} of a model comes without the digests of its chunks")
    return manifest


def is_shared(name: str) -> bool:
    """Whether a file of this name goes with a model: it describes it or holds its tensors.

    True of plain names only, so that none leads out of the directory."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:  # not UTF-8 on disk
        return False
    is_plain = 0 < size <= MAX_NAME_BYTES and "/" not in name and "\0" not in name
    return is_plain and name[0] != "." and _matches(name, DESCRIBING_FILES + WEIGHT_FILES)


def files_of(directory: Path) -> dict[str, FileVersion]:
    """Return the versions of the files of the model in `directory` that go with it, by name.

    Links are followed: the hub's cache consists of them. Raises TransferError, CheckpointError.
    """
    try:
        names = sorted(path.name for path in directory.iterdir() if path.is_file())
    except OSError as error:
        raise TransferError(f"cannot read {directory} ({error.strerror}); check the path") from None
    return {name: version_of(directory / name) for name in names if is_shared(name)}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)

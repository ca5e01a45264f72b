"""The safetensors container: its header, checked before anything in it is trusted. No torch.

Format: 8 bytes little-endian header length, a JSON header of name -> dtype, shape and byte range,
then the data, without gaps. Tensors are read with plain reads, never mapped: a file that shrinks
underneath is an error and not a SIGBUS.
"""

import math
import os
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from aegaeon.errors import CheckpointError

# Of models of 100,000 tensors it takes 12 MB; the limit of the format's own library is 100 MB, of
# which this process would make a gigabyte.
MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 1 << 18
ELEMENT_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

Size = Annotated[int, Meta(ge=0, le=1 << 60)]


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[Size, ...]
    data_offsets: tuple[Size, Size]


class StoredTensor(msgspec.Struct, frozen=True):
    """Where a tensor's bytes are: `offset` from the start of the file at `path`."""

    name: str
    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    data_bytes: int


# (bytes, mtime_ns, inode) of a file: another one in its place, or a changed one, differs.
FileVersion = tuple[int, int, int]


def version_of(path: str | Path) -> FileVersion:
    """Return the version of the file at `path`. Raises CheckpointError when there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116  # the fields, nothing of a path
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path} ({error.strerror}); download or import the model again"
        ) from None
    return status.st_size, status.st_mtime_ns, status.st_ino


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of the file at `path` by name. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or length > file_bytes - 8:
                raise _damaged(path, "the header is cut off")
            if length > MAX_HEADER_BYTES:
                raise _damaged(path, f"the header claims {length} bytes")
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path} ({error.strerror}); download or import the model again"
        ) from None
    return parse_header(header, file_bytes - 8 - length, path)


def parse_header(header: bytes, data_bytes: int, path: Path) -> dict[str, StoredTensor]:
    """Check a header against the `data_bytes` that follow it. Raises CheckpointError."""
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        if len(raw) > MAX_TENSORS:
            raise _damaged(path, f"the header names {len(raw)} tensors")
        entries = {name: msgspec.json.decode(value, type=_Entry) for name, value in raw.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(path, f"the header is not valid ({error})") from None
    tensors = {}
    end = 0
    start_of_data = 8 + len(header)
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        _check_entry(name, entry, end, path)
        end = entry.data_offsets[1]
        tensors[name] = StoredTensor(
            name=name,
            path=str(path),
            dtype=entry.dtype,
            shape=entry.shape,
            offset=start_of_data + entry.data_offsets[0],
            data_bytes=end - entry.data_offsets[0],
        )
    if end != data_bytes:
        state = "truncated" if end > data_bytes else "too long"
        raise _damaged(path, f"it is {state}: the header names {end} bytes, {data_bytes} are there")
    return tensors


def _check_entry(name: str, entry: _Entry, previous_end: int, path: Path) -> None:
    begin, end = entry.data_offsets
    if begin != previous_end or end < begin:
        raise _damaged(path, f"tensor {name!r} lies at {begin}..{end}, expected {previous_end}")
    if entry.dtype not in ELEMENT_BYTES:
        raise _damaged(path, f"tensor {name!r} has the unknown type {entry.dtype!r}")
    needed = math.prod(entry.shape) * ELEMENT_BYTES[entry.dtype]
    if needed != end - begin:
        raise _damaged(path, f"tensor {name!r} needs {needed} bytes and has {end - begin}")


def _damaged(path: Path, fact: str) -> CheckpointError:
    return CheckpointError(
        f"{_printable(str(path))} is damaged: {_printable(fact)}; "
        "download or import the model again"
    )


def _printable(text: Any) -> str:
    """Keep a damaged file's bytes from breaking the one line of an error."""
    line = "".join(char if char.isprintable() else "?" for char in str(text))
    return line if len(line) <= 300 else line[:300] + "..."

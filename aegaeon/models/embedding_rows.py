"""The rows of an embedding that a step needs, before the stage that they belong to is in.

A prompt needs few of them, and no layer computes without: so they are looked for in the node's
cache and then in the checkpoint's file. Whoever gets none waits for the stage.
"""

import logging
import os
import threading
import time

import torch
from torch import Tensor

from aegaeon.device.packed import Matrix, pack, unpack, unpack_rows
from aegaeon.errors import AegaeonError, CheckpointError
from aegaeon.models.checkpoint import EMBEDDING
from aegaeon.models.packing import PackedTensor, PackPlan
from aegaeon.models.safetensors import FileVersion, StoredTensor
from aegaeon.models.stages import Stages
from aegaeon.models.weights import DTYPES

log = logging.getLogger(__name__)

# For more of them, single reads take as long as the stage does.
MOST_ROWS = 512
# A disk that has not answered by then hangs: the stage may come from elsewhere.
READ_S = 2.0
# Between looks at whether the stage has come before the rows.
LOOK_S = 0.005


class EmbeddingRows:
    """Gathers rows of the embedding of a model that comes in. No failure to do so is raised."""

    def __init__(self, plan: PackPlan, stages: Stages) -> None:
        self._place = plan.tensors[EMBEDDING]
        self._version = plan.load_plan.files[self._place.source.path]
        self._stages = stages
        self._reading: _Reading | None = None

    def gather(self, token_ids: Tensor) -> tuple[Tensor, Matrix] | None:
        """Return a matrix of the rows that `token_ids` [rows] name, each once, and the ids' places
        in it [rows]; None when the stage is to be awaited. Rows of int8 come as the float32 that
        they stand for: to be rounded again, they would not be the same."""
        place = self._place
        distinct, places = torch.unique(token_ids, return_inverse=True)
        if not 0 < len(distinct) <= MOST_ROWS:
            return None
        if int(distinct[0]) < 0 or int(distinct[-1]) >= place.shape[0]:
            return None  # for the operator to refuse
        rows = self._from_cache(distinct)
        if rows is None:
            rows = self._from_file(distinct)
        if rows is None:
            return None
        if place.layout == "tiles":
            return places, pack(rows, rows.dtype)
        return places, Matrix(rows, rows.data_ptr(), len(rows), place.shape[1], rows.dtype)

    def _from_cache(self, ids: Tensor) -> Tensor | None:
        place = self._place
        dtype = DTYPES[place.dtype]
        try:
            with self._stages.cached(place.stage) as memory:
                if memory is None:
                    return None
                packed = torch.frombuffer(
                    memory, dtype=torch.uint8, count=place.data_bytes, offset=place.offset
                )
                if place.layout == "rows":
                    return packed.view(dtype).view(place.shape)[ids]
                return unpack_rows(packed, place.shape[1], dtype, ids)
        except AegaeonError as error:
            log.debug("no embedding rows in the cache error=%s", error)
            return None

    def _from_file(self, ids: Tensor) -> Tensor | None:
        if self._reading is not None and not self._reading.has_ended(0.0):
            return None
        give_up_s = time.monotonic() + READ_S
        try:
            self._reading = _Reading(self._place, self._version, ids.tolist())
        except RuntimeError as error:
            log.debug("no thread for embedding rows error=%s", error)
            return None
        while not self._reading.has_ended(LOOK_S):
            if self._stages.is_in(self._place.stage) or time.monotonic() >= give_up_s:
                return None
        return self._reading.rows


class _Reading:
    """A read on a thread of its own, which a disk that hangs keeps until it answers."""

    def __init__(self, place: PackedTensor, version: FileVersion, ids: list[int]) -> None:
        """Begin. Raises RuntimeError when the system gives no thread."""
        self.rows: Tensor | None = None  # [len(ids), columns] once ended, unless that failed
        self._thread = threading.Thread(
            target=self._read, args=(place, version, ids), name="embedding rows", daemon=True
        )
        self._thread.start()

    def has_ended(self, timeout_s: float) -> bool:
        """Wait so long for the end, and say whether it has come."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _read(self, place: PackedTensor, version: FileVersion, ids: list[int]) -> None:
        try:
            rows = read_rows(place.source, version, ids)
            dtype = DTYPES[place.dtype]
            self.rows = unpack(pack(rows, dtype)) if dtype == torch.int8 else rows
        except (OSError, CheckpointError, ValueError) as error:
            log.debug("no embedding rows from the file path=%s error=%s", place.source.path, error)


def read_rows(tensor: StoredTensor, version: FileVersion, ids: list[int]) -> Tensor:
    """Return the rows `ids` of a stored matrix, [len(ids), columns], in the type of the file.

    Raises OSError, and CheckpointError when the file is not of this version or ends too soon.
    """
    row_bytes = tensor.data_bytes // tensor.shape[0]
    offsets = [tensor.offset + row * row_bytes for row in ids]
    # As in the readers of whole models: something else in the file's place must not block.
    file = os.open(tensor.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check_version(file, tensor, version)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        # All of them at once, instead of each after the one before.
        for offset in offsets:
            os.posix_fadvise(file, offset, row_bytes, os.POSIX_FADV_WILLNEED)
        read = bytearray().join(_pread(file, tensor, offset, row_bytes) for offset in offsets)
        _check_version(file, tensor, version)
    finally:
        os.close(file)
    return torch.frombuffer(read, dtype=DTYPES[tensor.dtype]).view(len(ids), -1)


def _check_version(file: int, tensor: StoredTensor, version: FileVersion) -> None:
    status = os.fstat(file)
    if (status.st_size, status.st_mtime_ns, status.st_ino) != version:
        raise CheckpointError(f"{tensor.path} was changed since it was planned; load it again")


def _pread(file: int, tensor: StoredTensor, offset: int, size: int) -> bytes:
    read = os.pread(file, size, offset)
    while len(read) < size:
        part = os.pread(file, size - len(read), offset + len(read))
        if not part:
            raise CheckpointError(f"{tensor.path} ends too soon; download or import it again")
        read += part
    return read

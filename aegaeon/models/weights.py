"""A packed model's tensors as operands, and a plain reader of them into memory of one's own."""

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aegaeon.device.packed import Matrix, pack_into
from aegaeon.errors import CheckpointError
from aegaeon.models.packing import PackedTensor, PackPlan
from aegaeon.models.safetensors import StoredTensor
from aegaeon.models.stages import AllIn, Stages

OnProgress = Callable[[int, int], None]

DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8
}  # fmt: skip


class PackedWeights:
    """Views of the packed model of `plan` in `memory`, a 64-byte aligned buffer or the uint8 tensor
    of a device's memory, which they keep.

    `stages` tell what of it is in.
    """

    def __init__(self, memory: Any, plan: PackPlan, stages: Stages | None = None) -> None:
        """Without `stages`, everything is in."""
        self.plan = plan
        self.stages = AllIn() if stages is None else stages
        if isinstance(memory, Tensor):
            self.memory = memory[: plan.total_bytes]
        else:
            self.memory = torch.frombuffer(memory, dtype=torch.uint8, count=plan.total_bytes)
        self._address = self.memory.data_ptr()

    def matrix(self, name: str) -> Matrix:
        """Return the matrix of this name. Its stage need not be in yet."""
        tensor = self.plan.tensors[name]
        out_features, in_features = tensor.shape
        address = self._address + tensor.offset
        return Matrix(self.memory, address, out_features, in_features, DTYPES[tensor.dtype])

    def vector(self, name: str) -> Tensor:
        """Return the vector of this name, float32 in place. Its stage need not be in yet."""
        tensor = self.plan.tensors[name]
        end = tensor.offset + tensor.data_bytes
        return self.memory[tensor.offset : end].view(torch.float32)

    def has(self, name: str) -> bool:
        """Tell whether the model has this tensor."""
        return name in self.plan.tensors


def read_weights(plan: PackPlan, on_progress: OnProgress | None = None) -> PackedWeights:
    """Read all tensors into private memory, one after another.

    `on_progress(bytes_done, bytes_total)` counts file bytes, after each tensor. Raises
    CheckpointError if a file has changed since it was planned, or holds what int8 cannot.
    """
    memory = mmap.mmap(-1, plan.total_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # a fifth more bandwidth in products of few rows
    packed = torch.frombuffer(memory, dtype=torch.uint8)
    done, total = 0, plan.load_plan.file_bytes
    for tensor in plan.tensors.values():
        _pack_into(packed[tensor.offset : tensor.offset + tensor.data_bytes], tensor)
        done += tensor.source.data_bytes
        if on_progress is not None:
            on_progress(done, total)
    return PackedWeights(memory, plan)


def _pack_into(place: Tensor, tensor: PackedTensor) -> None:
    read = _read(tensor.source)
    dtype = DTYPES[tensor.dtype]
    if tensor.layout == "rows":
        place.view(dtype).copy_(read.view(-1))
        return
    try:
        pack_into(place, read, dtype)
    except ValueError as error:
        raise CheckpointError(
            f"{tensor.source.path}: tensor {tensor.name!r}: {error}; serve the model as it is "
            "(--quantize none), or restore the file"
        ) from None


def _read(tensor: StoredTensor) -> Tensor:
    buffer = torch.empty(tensor.data_bytes, dtype=torch.uint8)
    _read_into(buffer.numpy().data, tensor)
    return buffer.view(DTYPES[tensor.dtype]).view(tensor.shape)


def _read_into(view: memoryview, tensor: StoredTensor) -> None:
    try:
        with Path(tensor.path).open("rb", buffering=0) as file:
            file.seek(tensor.offset)
            done = 0
            # One read returns at most 2 GiB, whatever it is asked for.
            while done < len(view) and (read := file.readinto(view[done:])):
                done += read
    except OSError as error:
        raise CheckpointError(
            f"cannot read {tensor.path} ({error.strerror}); download or import the model again"
        ) from None
    if done < len(view):
        raise CheckpointError(
            f"{tensor.path} was cut off while tensor {tensor.name!r} was read; "
            "download or import the model again"
        )

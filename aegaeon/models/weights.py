"""Reads the tensors of a load plan and places them on a device, one at a time."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from aegaeon.device.base import Device
from aegaeon.errors import CheckpointError
from aegaeon.models.checkpoint import LoadPlan
from aegaeon.models.safetensors import StoredTensor

OnProgress = Callable[[int, int], None]

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightReader:
    """Places tensors of one plan; at any time one tensor (or one fused group) is held twice.

    `on_progress(bytes_done, bytes_total)` counts file bytes and is called after each tensor.
    """

    def __init__(self, plan: LoadPlan, device: Device, on_progress: OnProgress | None) -> None:
        self._tensors = plan.tensors
        self._device = device
        self._on_progress = on_progress
        self._done_bytes, self._total_bytes = 0, plan.file_bytes
        self.placed_bytes = 0

    def place(self, *names: str, for_products: bool = False) -> Tensor:
        """Return the named tensors, one below the other along dimension 0, on the device.

        `for_products` is as in Device.place. Raises CheckpointError if a file has changed since it
        was planned.
        """
        stored = [self._tensors[name] for name in names]
        if len({tensor.dtype for tensor in stored}) == 1:
            whole = _read(stored)
        else:
            whole = torch.cat([_read([tensor]).to(torch.float32) for tensor in stored])
        placed = self._device.place(whole, for_products)
        self.placed_bytes += placed.numel() * placed.dtype.itemsize
        self._done_bytes += sum(tensor.data_bytes for tensor in stored)
        if self._on_progress is not None:
            self._on_progress(self._done_bytes, self._total_bytes)
        return placed

    def place_if_stored(self, *names: str) -> Tensor | None:
        """Like place, or None where the plan has no such tensors."""
        return self.place(*names) if names[0] in self._tensors else None


def _read(tensors: list[StoredTensor]) -> Tensor:
    """Read tensors of one dtype and equal trailing sizes into one new tensor."""
    buffer = torch.empty(sum(tensor.data_bytes for tensor in tensors), dtype=torch.uint8)
    view = buffer.numpy().data
    start = 0
    for tensor in tensors:
        _read_into(view[start : start + tensor.data_bytes], tensor)
        start += tensor.data_bytes
    rows = sum(tensor.shape[0] for tensor in tensors)
    return buffer.view(DTYPES[tensors[0].dtype]).view(rows, *tensors[0].shape[1:])


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

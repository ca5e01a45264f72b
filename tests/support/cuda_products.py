"""Products of a CUDA device that this host stands in for."""

import ctypes
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from aegaeon.device.packed import TYPE_CODES
from aegaeon.device.products import Products


def host_view(memory) -> Tensor:
    """Return the device's memory, which here is the host's, and which the tensor keeps."""
    buffer = (ctypes.c_uint8 * memory.size_bytes).from_address(memory.address)
    buffer.memory = memory
    return torch.frombuffer(buffer, dtype=torch.uint8)


class HostProducts(Products):
    """Multiplies in float32 what has been rounded, on the streams of the stand-in `module`. Tiles
    are of few rows, for the time's sake, unless a test wants others."""

    def __init__(self, module: ModuleType, tile_rows: int = 4) -> None:
        self.calls: list[tuple[int, ...]] = []  # the shapes of each product
        self._module = module
        self._tile_rows = tile_rows
        self._stream = 0

    def view(self, memory) -> Tensor:
        return host_view(memory)

    def tile_rows(self, dtype: torch.dtype) -> int:
        return self._tile_rows

    def multiply(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        assert x.dtype == weight.dtype and x.is_contiguous() and weight.is_contiguous()
        assert out.dtype == torch.float32 and out.stride(1) == 1
        self.calls.append((*x.shape, *weight.shape))
        places = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        shape = *x.shape, len(weight)
        code = TYPE_CODES[weight.dtype]
        self._module.multiply(self._stream, places, shape, code, out.stride(0))

    def on_stream(self, stream: int) -> AbstractContextManager[object]:
        self._stream = stream
        return nullcontext()

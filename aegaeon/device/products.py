"""The products of a CUDA device's steps: who makes them, over how many rows at once.

A row's bits must not depend on its batch mates. The vendor's library chooses its algorithm by the
shape, so every product of a weight is the same call: as many rows, the last tile padded with what
nobody reads; the same strides and types; tiles of which x begins at a multiple of 64 bytes, and
what is made of it always as far behind one. That each row of a call is summed up alike is then a
property of the one algorithm, which splits sums by their length or not at all; tests on a device
look for it.

A tile costs what its rows do, so it has to stay below the ridge, where a device computes as long as
it moves: R rows make R operations of each byte of 16-bit weights that is read. The ridge is at 989
TFLOP/s / 3.35 TB/s = 295 on H100 and H800, 206 on H200, 312 / 2.04 = 153 on A100 (1.56: 200), 165
on RTX 4090: tiles of 128 rows leave a decode bound by memory on all of them. (Not on H20: 148 / 4.0
= 37; there a tile of 128 takes 3.5 times what reading does.) Beside the weights, N outputs of K
inputs, a product writes its tile: 128 float32 rows are 512 bytes of each of N columns, 256 / K of
the weights' 2 K: 6 % for K = 4096, the padding included. Of float32 weights, at full precision, R
rows make R / 2 a byte, and the ridge is at 67 / 3.35 = 20 on H100, 9.6 on A100 (19.5 / 2.04): 16
rows, 16 / K of the weights' bytes.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from aegaeon import _native
from aegaeon.errors import DeviceError

HALF_TILE_ROWS = 128
FLOAT_TILE_ROWS = 16
# Bytes between tiles, of x and of what is made, are a multiple of it for rows of any length.
TILE_ALIGNMENT = 64


class Products(ABC):
    """Multiplies on a stream. Tensors lie in the device's memory."""

    @abstractmethod
    def view(self, memory: _native.CudaMemory) -> Tensor:
        """Return `memory`, which it keeps: [bytes] uint8."""

    @abstractmethod
    def multiply(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """Make out [tile rows, outputs] float32, rows of it apart, of x [tile rows, inputs] times
        weight [outputs, inputs] transposed: sums in float32, whatever the type of both."""

    @abstractmethod
    def on_stream(self, stream: int) -> AbstractContextManager[object]:
        """Return a context in which products go to the stream of this address."""

    def tile_rows(self, dtype: torch.dtype) -> int:
        """Return the rows of a product with weights of `dtype`."""
        return FLOAT_TILE_ROWS if dtype == torch.float32 else HALF_TILE_ROWS


class TorchProducts(Products):
    """By torch, which calls cuBLAS. Settings of torch are the process's: made once, here."""

    def __init__(self, number: int) -> None:
        """For cuda:`number`. Raises DeviceError for a torch without CUDA, or too old."""
        check_torch()
        self._device = torch.device("cuda", number)
        matmul = torch.backends.cuda.matmul
        # Sums of partial sums are float32, too. That there be none (allow_splitk of newer ones) is
        # for cuBLASLt alone: torch raises then for what goes to cuBLAS, as these products do.
        matmul.allow_bf16_reduced_precision_reduction = False
        matmul.allow_fp16_reduced_precision_reduction = False
        matmul.allow_fp16_accumulation = False
        torch.set_float32_matmul_precision("highest")

    def view(self, memory: _native.CudaMemory) -> Tensor:
        return view_of(memory)

    def multiply(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        assert x.data_ptr() % TILE_ALIGNMENT == 0, (
            "an operand's algorithm may go by where it begins"
        )
        if weight.dtype == torch.float32:
            torch.mm(x, weight.T, out=out)
        else:
            torch.ops.aten.mm.dtype_out(x, weight.T, torch.float32, out=out)

    def on_stream(self, stream: int) -> AbstractContextManager[object]:
        external = torch.cuda.ExternalStream(stream, device=self._device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(external)


def view_of(memory: _native.CudaMemory) -> Tensor:
    """Return `memory`, which it keeps, as torch sees it: [bytes] uint8. Raises DeviceError for a
    torch without CUDA."""
    check_torch()
    return torch.as_tensor(_ArrayInterface(memory), device=f"cuda:{memory.number}")


def check_torch() -> None:
    """Raise DeviceError for a torch without CUDA, or without products of 16 bits in float32."""
    if not torch.cuda.is_available():
        raise DeviceError(
            f"torch {torch.__version__} here cannot use CUDA; install a torch built for CUDA "
            "(https://pytorch.org), or serve with --device cpu"
        )
    check_products()


def check_products() -> None:
    """Raise DeviceError where this torch has no products of 16 bits that are float32."""
    if not hasattr(torch.ops.aten.mm, "dtype_out"):
        raise DeviceError(
            f"torch {torch.__version__} rounds products of 16 bits; install torch 2.8 or newer, "
            "whose mm takes out_dtype, or serve with --device cpu"
        )


class _ArrayInterface:
    """What torch makes a tensor of without a copy; the tensor keeps it, and so the memory."""

    def __init__(self, memory: _native.CudaMemory) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": (memory.size_bytes,),
            "typestr": "|u1",
            "data": (memory.address, False),
            "strides": None,
            "version": 3,
        }

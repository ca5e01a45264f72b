"""Weights in the layout that operators compute in place on: tiles of 32 outputs.

A tile is [in_features, 32]: line k holds the k-th weight of 32 outputs, 64 bytes in the half types.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_OUTPUTS = 32
ALIGNMENT_BYTES = 64
# The codes of csrc/ops/ops.h.
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [out_features, in_features] at `address`: [ceil(out / 32)][in][32] of `dtype`.

    `owner` is what keeps the memory alive; nobody writes there.
    """

    owner: object
    address: int
    out_features: int
    in_features: int
    dtype: torch.dtype

    @property
    def operand(self) -> tuple[int, int, int]:
        """The matrix as native operators take it."""
        return self.address, self.out_features, TYPE_CODES[self.dtype]


def pack(weight: Tensor, dtype: torch.dtype) -> Matrix:
    """Return `weight` [out, in] packed as `dtype` in memory of its own."""
    out_features, in_features = weight.shape
    tiles = torch.empty((-(-out_features // TILE_OUTPUTS), in_features, TILE_OUTPUTS), dtype=dtype)
    pack_into(tiles, weight)
    # torch aligns what it allocates to 64 bytes.
    return Matrix(tiles, tiles.data_ptr(), out_features, in_features, dtype)


def pack_into(tiles: Tensor, weight: Tensor) -> None:
    """Write `weight` [out, in] to `tiles` [ceil(out / 32), in, 32], converting the type."""
    whole, rest = divmod(weight.shape[0], TILE_OUTPUTS)
    rows = weight[: whole * TILE_OUTPUTS].view(whole, TILE_OUTPUTS, weight.shape[1])
    tiles[:whole] = rows.transpose(1, 2)
    if rest:
        tiles[whole, :, :rest] = weight[whole * TILE_OUTPUTS :].T
        tiles[whole, :, rest:] = 0


def unpack(matrix: Matrix) -> Tensor:
    """Return a copy [out, in] of the matrix, in its type."""
    tiles = -(-matrix.out_features // TILE_OUTPUTS)
    count = tiles * matrix.in_features * TILE_OUTPUTS
    memory = (ctypes.c_char * (count * matrix.dtype.itemsize)).from_address(matrix.address)
    lines = torch.frombuffer(memory, dtype=matrix.dtype)
    rows = lines.view(tiles, matrix.in_features, TILE_OUTPUTS).transpose(1, 2)
    return rows.reshape(-1, matrix.in_features)[: matrix.out_features].clone()

"""Weights in the layout that operators compute in place on: tiles of 32 outputs.

A tile of float32 or float16 is [in_features, 32]: line k holds the k-th weight of 32 outputs. One
of bfloat16 is [in_features / 2, 32, 2], the inputs in pairs; with an odd number of inputs weights
are packed as the float32 that they stand for. One of int8 is groups of 64 inputs with a scale per
output: see csrc/ops/ops.h.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from aegaeon import _native

TILE_OUTPUTS = 32
GROUP_INPUTS = 64
ALIGNMENT_BYTES = 64
LINE_BYTES = 2 * TILE_OUTPUTS  # of int8 tiles: scales, or two inputs
GROUP_BYTES = (1 + GROUP_INPUTS // 2) * LINE_BYTES
# The codes of csrc/ops/ops.h.
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
# Of bfloat16 weights that meet what they are multiplied with as bfloat16.
BF16_PRODUCTS_CODE = 4
# Those of csrc/memory/pack.h, of what int8 is made of.
CONVERT_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [out_features, in_features] at `address`, tiles of `dtype`; int8 has scales.

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

    def factor(self, x_dtype: torch.dtype) -> tuple[int, int, int]:
        """Return the matrix as operators take it to multiply x with: where both are bfloat16, x is
        rounded to it before; other weights meet float32."""
        is_rounding = x_dtype == self.dtype == torch.bfloat16
        code = BF16_PRODUCTS_CODE if is_rounding else TYPE_CODES[self.dtype]
        return self.address, self.out_features, code


def kept_as(dtype: torch.dtype, in_features: int) -> torch.dtype:
    """Return the type in which tiles hold weights that are to be of `dtype`."""
    return torch.float32 if dtype == torch.bfloat16 and in_features % 2 else dtype


def tile_bytes(in_features: int, dtype: torch.dtype) -> int:
    """Return the bytes of a tile of 32 outputs."""
    if dtype != torch.int8:
        return TILE_OUTPUTS * in_features * dtype.itemsize
    return LINE_BYTES * (-(-in_features // GROUP_INPUTS) + -(-in_features // 2))


def pack(weight: Tensor, dtype: torch.dtype) -> Matrix:
    """Return `weight` [out, in] packed as `dtype` in memory of its own. Raises ValueError where
    int8 is to hold infinity or NaN."""
    out_features, in_features = weight.shape
    dtype = kept_as(dtype, in_features)
    tiles = -(-out_features // TILE_OUTPUTS)
    # torch aligns what it allocates to 64 bytes.
    place = torch.empty(tiles * tile_bytes(in_features, dtype), dtype=torch.uint8)
    pack_into(place, weight, dtype)
    return Matrix(place, place.data_ptr(), out_features, in_features, dtype)


def pack_into(place: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    """Write `weight` [out, in] as tiles of `dtype` to the bytes `place`, 64-byte aligned. Raises
    ValueError where int8 is to hold infinity or NaN."""
    if dtype == torch.int8:
        weight = weight.contiguous()
        shape = (weight.shape[0], weight.shape[1])
        convert = CONVERT_CODES[weight.dtype]
        _native.quantize_tiles(weight.data_ptr(), shape, convert, place.data_ptr())
        return
    if dtype == torch.bfloat16:  # pairs, as elements that are twice as wide
        place, weight = place.view(torch.int32), weight.to(dtype).contiguous().view(torch.int32)
    else:
        place = place.view(dtype)
    tiles = place.view(-1, weight.shape[1], TILE_OUTPUTS)
    whole, rest = divmod(weight.shape[0], TILE_OUTPUTS)
    rows = weight[: whole * TILE_OUTPUTS].view(whole, TILE_OUTPUTS, weight.shape[1])
    tiles[:whole] = rows.transpose(1, 2)
    if rest:
        tiles[whole, :, :rest] = weight[whole * TILE_OUTPUTS :].T
        tiles[whole, :, rest:] = 0


def unpack(matrix: Matrix) -> Tensor:
    """Return a copy [out, in] of the matrix, in its type; of int8, float32."""
    tiles = -(-matrix.out_features // TILE_OUTPUTS)
    count = tiles * tile_bytes(matrix.in_features, matrix.dtype)
    memory = (ctypes.c_char * count).from_address(matrix.address)
    place = torch.frombuffer(memory, dtype=torch.uint8)
    rows = torch.arange(matrix.out_features)
    return unpack_rows(place, matrix.in_features, matrix.dtype, rows)


def unpack_rows(place: Tensor, in_features: int, dtype: torch.dtype, rows: Tensor) -> Tensor:
    """Return copies [len(rows), in] of rows of the tiles in the bytes `place`, in their type; of
    int8, float32, as operators take them."""
    tiles, outputs = rows // TILE_OUTPUTS, rows % TILE_OUTPUTS
    if dtype == torch.bfloat16:
        pairs = place.view(torch.int32).view(-1, in_features // 2, TILE_OUTPUTS)[tiles, :, outputs]
        return pairs.contiguous().view(dtype)
    if dtype != torch.int8:
        return place.view(dtype).view(-1, in_features, TILE_OUTPUTS)[tiles, :, outputs]
    inputs = torch.arange(in_features)
    groups = inputs // GROUP_INPUTS * GROUP_BYTES
    lines = groups + (1 + inputs % GROUP_INPUTS // 2) * LINE_BYTES
    first = (tiles * tile_bytes(in_features, dtype) + 2 * outputs)[:, None]
    weights = place.view(torch.int8)[first + lines + inputs % 2]
    scales = place.view(torch.bfloat16)[(first + groups) // 2]
    return weights.float() * scales.float()

"""Paged keys and values as CUDA kernels have them, on the CPU: what nobody wrote is NaN."""

import ctypes
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.emulated import call

BLOCK_TOKENS = 16
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
Part = tuple[int, int, int]  # sequence, start, rows
Bounds = tuple[int, int, int, int, int]  # a StepBounds
NONE = (0, 0, 0, 0, 0)


class Given(ctypes.Structure):
    """As csrc/testing/cuda_kernels.cpp has it."""

    _fields_ = (
        ("pages", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kv_heads", "head_dim", "type", "count")),
        ("sequences", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
        ("least", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Shape:
    """Heads, KV heads and elements, and the type of keys and values."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class DeviceKv:
    """Sequences of random tokens in random blocks, of which any rows may be attended."""

    LAYERS = 2

    def __init__(self, lengths: Sequence[int], shape: Shape) -> None:
        self.shape = shape
        block_pages = self.LAYERS * 2 * shape.kv_heads
        counts = [-(-length // BLOCK_TOKENS) for length in lengths]
        # Pages that are no block's lie between blocks.
        ids = [3 + at * (block_pages + 1) for at in range(sum(counts))]
        random.Random(len(lengths)).shuffle(ids)
        self.blocks = [[ids.pop() for _ in range(count)] for count in counts]
        pages = 3 + (sum(counts) + 1) * (block_pages + 1)
        self.pages = torch.full((pages, BLOCK_TOKENS, shape.head_dim), math.nan, dtype=shape.dtype)
        kv, heads = (shape.kv_heads, shape.head_dim), (shape.heads, shape.head_dim)
        self.q = [randn(n, *heads, seed=100 + i) for i, n in enumerate(lengths)]
        self.k = [randn(n, *kv, seed=200 + i) for i, n in enumerate(lengths)]
        self.v = [randn(n, *kv, seed=300 + i) for i, n in enumerate(lengths)]

    def write(self, layer: int = 1) -> None:
        """Put all keys and values where `append_kv` would."""
        for blocks, keys, values in zip(self.blocks, self.k, self.v, strict=True):
            for position, (key, value) in enumerate(zip(keys, values, strict=True)):
                page = blocks[position // BLOCK_TOKENS] + layer * 2 * self.shape.kv_heads
                for kept in (key, value):
                    pages = self.pages[page : page + self.shape.kv_heads]
                    pages[:, position % BLOCK_TOKENS] = kept.to(self.shape.dtype)
                    page += self.shape.kv_heads

    def attend(self, parts: Sequence[Part], scale: float, least: Bounds = NONE) -> Tensor:
        """Return the rows of `parts`, [rows, heads, head_dim]; rows of nobody between them."""
        queries = self.rows_of(self.q, parts)
        out = torch.full_like(queries, math.nan)
        given, kept = self.given(parts, least)
        call("attend", given, 1, queries, scale, out)
        del kept
        assert out[0].isnan().all()
        return torch.cat([out[first : first + rows] for first, rows in self.places(parts)])

    def expected(self, parts: Sequence[Part], scale: float) -> Tensor:
        """Return the same by the formula, in float64 from what the pages hold."""
        return torch.cat([self._expected(*part, scale) for part in parts])

    def given(self, parts: Sequence[Part], least: Bounds) -> tuple[Given, list[object]]:
        """Return the operands, and what must live as long."""
        sequences, ids = [], []
        for (first, rows), (sequence, start, _) in zip(self.places(parts), parts, strict=True):
            blocks = self.blocks[sequence][: -(-(start + rows) // BLOCK_TOKENS)]
            sequences += [first, rows, start, len(blocks)]
            ids += blocks
        arrays = [(ctypes.c_int64 * len(x))(*x) for x in (sequences, ids, least)]
        shape = self.shape
        sizes = (shape.kv_heads, shape.head_dim, TYPE_CODES[shape.dtype], len(parts))
        places = [ctypes.addressof(array) for array in arrays]
        given = Given(self.pages.data_ptr(), *sizes, *places[:2], shape.heads, places[2])
        return given, [*arrays]

    def places(self, parts: Sequence[Part]) -> list[tuple[int, int]]:
        """Return (first row, rows) of each part; a row of nobody before each."""
        places, first = [], 1
        for _, _, rows in parts:
            places.append((first, rows))
            first += rows + 1
        return places

    def rows_of(self, of: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
        """Return the rows of `parts` as a pass has them; NaN where a row is nobody's."""
        nobody = torch.full_like(of[0][:1], math.nan)
        cut = [torch.cat((nobody, of[s][start : start + rows])) for s, start, rows in parts]
        return torch.cat(cut)

    def _expected(self, sequence: int, start: int, rows: int, scale: float) -> Tensor:
        end = start + rows
        q = self.q[sequence][start:end].double()
        k, v = (of[sequence][:end].to(self.shape.dtype).double() for of in (self.k, self.v))
        per_head = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(per_head, dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * scale
        hidden = torch.ones(scores.shape[1:]).triu(1 + start).bool()
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return torch.einsum("hij,jhd->ihd", weights, v)

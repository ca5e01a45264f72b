"""The attention kernels, run on the CPU by the emulation: the float64 formula over random
schedules, and the bits of a row against its company, its cut and the kernel that made it."""

import ctypes
import math

import pytest
import torch
from torch import Tensor

from tests.support.device_kv import DeviceKv, Shape
from tests.support.emulated import library, set_schedule

# It takes long; `make check-cuda` and `make test-all` run it.
pytestmark = pytest.mark.thorough

SCALE = 0.1
TYPES = [torch.float32, torch.bfloat16, torch.float16]
# Both half types take the same ways.
MOST = [*TYPES[:2], pytest.param(torch.float16, marks=pytest.mark.thorough)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Heads, KV heads, head_dim.
SHAPES = [(6, 2, 64), (3, 3, 96), (7, 1, 128), (2, 1, 256)]


@pytest.fixture(autouse=True)
def _in_order_afterwards():
    yield
    set_schedule(0, False)


def make(lengths, heads, dtype) -> DeviceKv:
    kv = DeviceKv(lengths, Shape(*heads, dtype))
    kv.write()
    return kv


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("heads", SHAPES)
def test_attention_is_the_float64_formula(heads, dtype):
    kv = make([1, 16, 45, 150], heads, dtype)
    set_schedule(heads[2], heads[0] % 2 == 0)
    parts = [(0, 0, 1), (1, 15, 1), (2, 3, 42), (3, 0, 150)]
    error = kv.attend(parts, SCALE).double() - kv.expected(parts, SCALE)
    assert error.abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", MOST)
def test_long_contexts_are_the_float64_formula_however_far_scores_lie_apart(dtype):
    kv = make([1300], (3, 1, 64), dtype)
    kv.q[0] *= torch.logspace(-3, 1, 1300)[:, None, None]
    for part in ((0, 1299, 1), (0, 1000, 300)):
        error = kv.attend([part], SCALE).double() - kv.expected([part], SCALE)
        # What a score of tens is rounded by, its weight is off by.
        assert error.abs().max() <= 5 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("heads", [(3, 1, 64), (1, 1, 256)])
def test_rows_have_the_same_bits_prefilled_chunked_or_decoded(heads, dtype):
    kv = make([800], heads, dtype)
    whole = kv.attend([(0, 0, 800)], SCALE)
    cuts = [(0, 1), (15, 1), (31, 2), (511, 1), (512, 1), (510, 4), (724, 76), (799, 1), (400, 200)]
    for start, rows in cuts:
        part = kv.attend([(0, start, rows)], SCALE)
        assert same_bits(part, whole[start : start + rows]), (start, rows)


@pytest.mark.parametrize("dtype", MOST)
def test_rows_have_the_same_bits_in_any_company_schedule_and_bounds(dtype):
    lengths = [700, 20, 258, 1030]
    kv = make(lengths, (4, 2, 96), dtype)
    parts = [(0, 699, 1), (1, 0, 20), (2, 200, 58), (3, 1028, 2)]
    alone = torch.cat([kv.attend([part], SCALE) for part in parts])
    for seed in range(5):
        set_schedule(seed, seed % 2 == 1)
        assert same_bits(kv.attend(parts, SCALE), alone), seed
    # As a captured step has them: rows, short tiles, their queries, splits, long tiles.
    assert same_bits(kv.attend(parts, SCALE, (200, 20, 300, 5, 4)), alone)


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [16, 100])
def test_what_is_not_finite_stays_in_its_sequence_and_behind_its_token(rows, bad, dtype):
    parts = [(0, 600 - rows, rows), (1, 599, 1)]
    kv = make([600, 600], (4, 2, 64), dtype)
    clean = kv.attend(parts, SCALE)
    kv.v[0][590, 0, 0] = bad
    kv.k[0][592, 1, 5] = bad
    kv.write()
    dirty = kv.attend(parts, SCALE)
    first = 590 - (600 - rows)
    assert same_bits(dirty[:first], clean[:first])
    assert not dirty[first + 2 : rows].isfinite().flatten(1).all(dim=1).any()
    assert not dirty[first : first + 2, :2].isfinite().flatten(1).all(dim=1).any()
    assert same_bits(dirty[first : first + 2, 2:], clean[first : first + 2, 2:])
    assert same_bits(dirty[rows], clean[rows])


def test_other_widths_of_a_head_are_refused():
    kv = make([20], (2, 1, 80), torch.bfloat16)
    with pytest.raises(RuntimeError, match="head_dim of 80; there are 64, 96, 128 and 256"):
        kv.attend([(0, 0, 20)], SCALE)


def test_blocks_that_kernels_cannot_name_are_refused():
    kv = make([20], (2, 1, 64), torch.bfloat16)
    kv.blocks[0][1] = 1 << 31
    with pytest.raises(RuntimeError, match="2147483648 has no 32 bits"):
        kv.attend([(0, 0, 20)], SCALE)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("code", "name"), list(enumerate(["float", "__nv_bfloat16", "__half"])))
def test_what_a_block_takes_is_the_larger_kernels(code, name, head_dim):
    kernels = [f"attend_{length}<{name}, {head_dim}>" for length in ("short", "long")]
    most = max(library().shared_bytes(kernel.encode()) for kernel in kernels)
    assert library().attend_shared_bytes(code, ctypes.c_int64(head_dim)) == most > 0


def test_of_a_width_without_kernels_nothing_is_known():
    for code in range(3):
        assert library().attend_shared_bytes(code, ctypes.c_int64(80)) == -1

"""Products with int8 weights: against float64 formulas within the stated error, and to the bit."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from aegaeon import _native
from aegaeon.device.cpu import CpuDevice
from aegaeon.device.packed import pack, unpack
from tests.support.instruction_sets import ISAS
from tests.support.int8_tiles import int8_tiles, rounded
from tests.support.products import multiply, randn

COLUMNS = (1, 2, 63, 64, 65, 130, 576)
OUTPUTS = (1, 31, 33, 100)
ROWS = (1, 2, 3, 5, 6, 7, 12, 13, 24, 70)
# Of max |x| of a group: half a step of 16 bits; what the division's rounding may add is in 1.01.
STEP = 1.01 / 65534
LEAST = 2.0**-127


def group_sizes(matrix: Tensor) -> Tensor:
    """Return max |element| of each element's group of 64."""
    columns = matrix.shape[1]
    padded = functional.pad(matrix.double().abs(), (0, -columns % 64))
    groups = padded.view(len(matrix), -1, 64).amax(-1)
    return groups.repeat_interleave(64, dim=1)[:, :columns]


def bound(x: Tensor, weight: Tensor) -> Tensor:
    """Return what products with int8 weights that stand for `weight` may be off by: x is rounded to
    16 bits by groups, and sums are float32."""
    rounding = (group_sizes(x) * STEP).clamp_min(LEAST)
    return rounding @ weight.double().abs().T + 1e-6 * (x.double().abs() @ weight.double().abs().T)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_linear_is_the_float64_product_within_the_stated_error(columns, isa):
    _native.force_isa(isa)
    for outputs in OUTPUTS:
        original = randn(outputs, columns, seed=outputs)
        matrix = pack(original, torch.int8)
        weight = unpack(matrix)
        # Half a step of 8 bits, where the scale is up to 2^-7 larger than it had to be.
        loss = group_sizes(original) * (1 + 2**-7) / 254
        assert ((weight - original).abs() <= loss).all()
        for rows in ROWS:
            x = randn(rows, columns, seed=rows)
            out = multiply(x, matrix).double()
            error = (out - x.double() @ weight.double().T).abs()
            assert (error <= bound(x, weight)).all(), (outputs, rows)
            error = (out - x.double() @ original.double().T).abs()
            assert (error <= bound(x, weight) + x.double().abs() @ loss.T).all(), (outputs, rows)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_have_the_same_bits_in_any_company_and_on_any_threads(isa):
    _native.force_isa(isa)
    matrix, x = pack(randn(75, 1123, seed=1), torch.int8), randn(600, 1123)
    whole = multiply(x, matrix)
    assert torch.equal(multiply(x, matrix, threads=3), whole)
    for first, count in [(0, 1), (599, 1), (17, 2), (100, 5), (3, 7), (250, 64), (1, 270)]:
        part = multiply(x[first : first + count], matrix, threads=2)
        assert torch.equal(part, whole[first : first + count]), (first, count)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(bad, isa):
    _native.force_isa(isa)
    matrix, x = pack(randn(40, 150, seed=1), torch.int8), randn(20, 150)
    clean = multiply(x, matrix)
    x[3, 77] = bad
    dirty = multiply(x, matrix)
    assert dirty[3].isnan().all()
    others = [row for row in range(20) if row != 3]
    assert torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [3.4e38, 1e30, 1e-30, 1e-37, 1e-40, 0.0])
def test_activations_of_any_size_are_right(size, isa):
    """Where a step would be subnormal it is 2^-126: half of that is the error then."""
    _native.force_isa(isa)
    weight = randn(33, 130, seed=1) / 1e4
    matrix = pack(weight, torch.int8)
    x = (randn(14, 130).clamp(-1, 1).double() * size).float()
    x[:, 64:128] = 0
    out = multiply(x, matrix).double()
    error = (out - x.double() @ unpack(matrix).double().T).abs()
    # Of sums that are themselves subnormal.
    assert (error <= bound(x, unpack(matrix)) + 2.0**-148).all()
    if size == 0:
        assert (out == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (31, 7), (32, 64), (33, 65), (70, 130), (64, 256)])
def test_weights_are_rounded_as_said(shape, dtype):
    weight = randn(*shape).to(dtype)
    matrix = pack(weight, torch.int8)
    assert matrix.address % 64 == 0
    expected = int8_tiles(weight.float().numpy())
    assert np.array_equal(matrix.owner.numpy(), expected[0])
    weights, scales = rounded(weight.float().numpy())
    wide = torch.from_numpy((scales.astype(np.uint32) << 16).view(np.float32).copy())
    wide = wide.repeat_interleave(64, dim=1)[:, : shape[1]]
    assert torch.equal(unpack(matrix), torch.from_numpy(weights).float() * wide)
    assert np.abs(weights.astype(int)).max() <= 127


@pytest.mark.parametrize("size", [1e-45, 1e-42, 1e-38, 1e-36, 1e37])
def test_weights_of_any_size_lose_half_a_step(size):
    weight = (randn(40, 100).clamp(-3, 3).double() * size).float()
    matrix = pack(weight, torch.int8)
    assert np.array_equal(matrix.owner.numpy(), int8_tiles(weight.numpy())[0])
    # bf16 has no scale below 2^-133.
    step = (group_sizes(weight) / 127 * (1 + 2**-7)).clamp_min(2.0**-133)
    step = step + 2.0**-133 * (group_sizes(weight) < 2.0**-118)
    assert ((unpack(matrix).double() - weight.double()).abs() <= step / 2 * (1 + 1e-6)).all()


def test_halves_round_to_even():
    weight = torch.zeros(1, 64)
    weight[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    matrix = pack(weight, torch.int8)  # the scale is 1
    assert unpack(matrix)[0, :6].tolist() == [127.0, 0.0, 2.0, 2.0, 0.0, -2.0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused(dtype, bad):
    weight = randn(40, 70).to(dtype)
    weight[33, 69] = bad
    with pytest.raises(ValueError, match="neither infinity nor NaN"):
        pack(weight, torch.int8)


def test_embedding_returns_the_rows_that_the_table_stands_for():
    for columns in (1, 2, 33, 64, 131):
        matrix = pack(randn(70, columns), torch.int8)
        ids = torch.tensor([0, 69, 31, 32, 5, 5, 64])
        assert torch.equal(CpuDevice(2).embed(ids, matrix), unpack(matrix)[ids])

"""Products of weights of bfloat16 with activations that are rounded to it."""

import pytest
import torch
from torch import Tensor

from aegaeon import _native
from aegaeon.device.base import Projection
from aegaeon.device.cpu import CpuDevice
from aegaeon.device.packed import Matrix, pack, unpack
from tests.support.instruction_sets import FUSED, ISAS
from tests.support.products import randn

BF16 = torch.bfloat16


def multiply(x: Tensor, *parts: Matrix, threads: int = 1) -> Tensor:
    return CpuDevice(threads).linear(x, Projection(parts, x_dtype=BF16))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(1, 2), (7, 6), (33, 578), (96, 1000), (160, 64)])
def test_the_product_is_that_of_the_rounded_rows(shape, isa):
    _native.force_isa(isa)
    weight = randn(*shape, seed=1).to(BF16)
    matrix = pack(weight, BF16)
    for rows in (1, 2, 3, 4, 6, 7, 13, 64, 265, 600):
        x = randn(rows, shape[1], seed=100 + rows)
        rounded = x.to(BF16).double()
        error = (multiply(x, matrix).double() - rounded @ weight.double().T).abs()
        assert (error <= 1e-6 * (rounded.abs() @ weight.double().abs().T)).all(), rows


@pytest.mark.parametrize("isa", ISAS)
def test_rows_have_the_same_bits_in_any_company_and_on_any_threads(isa):
    _native.force_isa(isa)
    matrix, x = pack(randn(75, 522, seed=1), BF16), randn(600, 522)
    whole = multiply(x, matrix)
    assert torch.equal(multiply(x, matrix, threads=3), whole)
    for first, count in [(0, 1), (599, 1), (17, 2), (100, 5), (3, 7), (250, 64), (1, 270)]:
        part = multiply(x[first : first + count], matrix, threads=2)
        assert torch.equal(part, whole[first : first + count]), (first, count)


def test_all_that_fuse_give_the_bits_of_float_products_of_rounded_rows():
    matrix, x = pack(randn(75, 522, seed=1), BF16), randn(40, 522)
    for isa in FUSED:
        _native.force_isa(isa)
        exact = CpuDevice().linear(x.to(BF16).float(), Projection((matrix,)))
        assert torch.equal(multiply(x, matrix), exact), isa


@pytest.mark.parametrize("isa", ISAS)
def test_only_parts_of_bfloat16_with_pairs_of_inputs_meet_rounded_rows(isa):
    _native.force_isa(isa)
    for columns in (70, 71):
        kinds = (torch.float32, BF16, torch.float16, torch.int8, BF16)
        parts = [pack(randn(33, columns, seed=at), kind) for at, kind in enumerate(kinds)]
        assert [part.dtype == BF16 for part in parts] == [
            kind == BF16 and columns == 70 for kind in kinds
        ]
        x = randn(9, columns)
        rows = [x.to(BF16) if part.dtype == BF16 else x for part in parts]
        expected = [
            row.double() @ unpack(part).double().T for row, part in zip(rows, parts, strict=True)
        ]
        assert torch.allclose(multiply(x, *parts).double(), torch.cat(expected, 1), atol=1e-3)


@pytest.mark.parametrize("isa", ISAS)
def test_gates_are_made_of_the_same_products(isa):
    _native.force_isa(isa)
    parts = tuple(pack(randn(70, 200, seed=seed), BF16) for seed in (1, 2))
    for rows in (1, 9, 70):
        x = randn(rows, 200)
        gate, up = multiply(x, *parts).double().chunk(2, dim=1)
        made = CpuDevice(2).gated(x, Projection(parts, x_dtype=BF16)).double()
        assert torch.allclose(made, gate * gate.sigmoid() * up, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3.4e38])
def test_what_is_not_finite_stays_in_its_row(bad, isa):
    """3.4e38 is beyond the largest bfloat16, and rounds to infinity."""
    _native.force_isa(isa)
    matrix, x = pack(randn(40, 50, seed=1), BF16), randn(8, 50)
    clean = multiply(x, matrix)
    x[3, 7] = bad
    dirty = multiply(x, matrix)
    assert not dirty[3].isfinite().any()
    others = [row for row in range(8) if row != 3]
    assert torch.equal(dirty[others], clean[others])


def test_ties_go_to_the_even_neighbour():
    # Between 1 and its next neighbour, 1 + 2^-7, and between that and the one after.
    x = torch.tensor([[1 + 2**-8, 0.0], [1 + 3 * 2**-8, 0.0], [-1 - 2**-8, 0.0]])
    made = multiply(x, pack(torch.ones(1, 2), BF16))[:, 0]
    assert made.tolist() == [1.0, 1 + 2**-6, -1.0]


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_subnormal_counts_as_what_it_is_or_as_zero(isa):
    """Of weights, rows and sums: instructions for bfloat16 take it for zero."""
    _native.force_isa(isa)
    least = torch.finfo(torch.float32).tiny
    weight, x = randn(40, 64, seed=1) * least, randn(7, 64) * 2.0 ** torch.arange(-8, 56).float()
    rounded, small = x.to(BF16).double(), weight.to(BF16).double()
    exact = rounded @ small.T
    lost = (rounded.abs() @ (small.abs() < least).double().T) * least + 64 * least
    error = (multiply(x, pack(weight, BF16)).double() - exact).abs()
    assert (error <= lost + 1e-6 * (rounded.abs() @ small.abs().T)).all()


def test_thousands_of_rows_have_the_bits_of_single_ones():
    matrix, x = pack(randn(40, 66, seed=1), BF16), randn(4100, 66)
    many = multiply(x, matrix, threads=2)
    for row in (0, 11, 263, 264, 2047, 4099):
        assert torch.equal(multiply(x[row : row + 1], matrix)[0], many[row]), row

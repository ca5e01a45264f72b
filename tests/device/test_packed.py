"""Products in place on packed weights: every type, instruction set, shape and thread count."""

import threading
import time

import pytest
import torch
from torch import Tensor

from aegaeon import _native
from aegaeon.device.base import Projection
from aegaeon.device.cpu import CpuDevice
from aegaeon.device.packed import kept_as, pack, unpack
from tests.support.instruction_sets import FUSED, ISAS
from tests.support.products import multiply, randn

TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (31, 7), (31, 6), (32, 34), (33, 64), (200, 96)])
def test_packing_keeps_every_element(shape, dtype):
    weight = randn(*shape).to(dtype)
    matrix = pack(weight, dtype)
    assert matrix.address % 64 == 0
    assert matrix.dtype == kept_as(dtype, shape[1])
    assert torch.equal(unpack(matrix), weight.to(matrix.dtype))


@pytest.mark.parametrize("dtype", [*TYPES, torch.int8])
def test_only_bfloat16_with_an_odd_number_of_inputs_becomes_another_type(dtype):
    assert kept_as(dtype, 6) == dtype
    assert kept_as(dtype, 7) == (torch.float32 if dtype == torch.bfloat16 else dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (7, 6), (33, 578), (96, 1000), (160, 64)])
def test_linear_is_the_float64_product(shape, dtype, isa):
    _native.force_isa(isa)
    weight = randn(*shape, seed=1).to(dtype)
    for rows in (1, 2, 3, 4, 6, 7, 13, 64, 265, 600):
        x = randn(rows, shape[1], seed=rows)
        expected = x.double() @ weight.double().T
        size = x.double().abs() @ weight.double().abs().T
        error = (multiply(x, pack(weight, dtype)).double() - expected).abs()
        assert (error <= 1e-6 * size).all(), rows


@pytest.mark.parametrize("isa", ISAS)
def test_parts_of_several_types_and_their_biases_lie_side_by_side(isa):
    _native.force_isa(isa)
    kinds = zip((40, 5, 33, 64), [*TYPES, torch.int8], strict=True)
    parts = tuple(pack(randn(out, 70, seed=out), dtype) for out, dtype in kinds)
    weights = [unpack(part).double() for part in parts]
    biases = tuple(randn(len(weight), seed=9) for weight in weights)
    projection = Projection(parts, biases)
    x = randn(9, 70)
    expected = torch.cat(
        [x.double() @ w.T + b.double() for w, b in zip(weights, biases, strict=True)], dim=1
    )
    added = randn(*expected.shape, seed=2)
    for threads in (1, 3):
        device = CpuDevice(threads)
        y = device.linear(x, projection)
        assert torch.allclose(y.double(), expected, atol=1e-3)
        # Added last, to what is rounded already.
        assert torch.equal(device.linear(x, projection, residual=added), y + added)
        apart = randn(added.shape[1], added.shape[0], seed=2).T
        assert torch.equal(device.linear(x, projection, residual=apart), y + apart)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
def test_rows_have_the_same_bits_in_any_company_and_on_any_threads(dtype, isa):
    _native.force_isa(isa)
    matrix, x = pack(randn(75, 522, seed=1), dtype), randn(600, 522)
    assert matrix.dtype == dtype
    whole = multiply(x, matrix)
    assert torch.equal(multiply(x, matrix, threads=3), whole)
    for first, count in [(0, 1), (599, 1), (17, 2), (100, 5), (3, 7), (250, 64), (1, 270)]:
        part = multiply(x[first : first + count], matrix, threads=2)
        assert torch.equal(part, whole[first : first + count]), (first, count)


@pytest.mark.skipif(len(FUSED) < 2, reason="this processor has no AVX-512")
@pytest.mark.parametrize("dtype", [*TYPES, torch.int8])
def test_instruction_sets_that_fuse_give_the_same_bits(dtype):
    matrix, x = pack(randn(75, 522, seed=1), dtype), randn(40, 522)
    assert matrix.dtype == dtype
    results = []
    for isa in FUSED:
        _native.force_isa(isa)
        results.append(multiply(x, matrix))
    assert all(torch.equal(result, results[0]) for result in results)


def every_half(dtype: torch.dtype) -> Tensor:
    """Return all of them in the first column, and in the last one."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    halves, nothing = bits.view(dtype), torch.zeros(1 << 16, dtype=dtype)
    return torch.stack((halves, nothing, nothing, halves), dim=1)


@pytest.mark.parametrize("column", [0, 3])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_widens_exactly(dtype, isa, column):
    """Subnormals, infinities and NaNs too: as weights of one column, times one; times zero in the
    other one, which makes NaNs of what is not finite."""
    _native.force_isa(isa)
    halves = every_half(dtype)
    matrix, expected = pack(halves, dtype), halves.float()[:, column]
    assert matrix.dtype == dtype
    for rows in (1, 5):
        x = torch.zeros(rows, 4)
        x[:, column] = 1
        product = multiply(x, matrix)
        is_finite = expected.isfinite()
        assert torch.equal(product[:, is_finite], expected[is_finite].expand(rows, -1))
        assert not product[:, ~is_finite].isfinite().any()
    embedded = CpuDevice().embed(torch.arange(1 << 16), matrix)[:, column]
    assert torch.equal(embedded.isnan(), expected.isnan())
    assert torch.equal(embedded[~expected.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("dtype", [*TYPES, torch.int8])
def test_thousands_of_rows_have_the_bits_of_single_ones(dtype):
    matrix, x = pack(randn(40, 66, seed=1), dtype), randn(4100, 66)
    many = multiply(x, matrix, threads=2)
    for row in (0, 11, 263, 264, 2047, 4099):
        assert torch.equal(multiply(x[row : row + 1], matrix)[0], many[row]), row


def test_a_nan_stays_in_its_row():
    matrix, x = pack(randn(40, 50, seed=1), torch.bfloat16), randn(8, 50)
    clean = multiply(x, matrix)
    x[3, 7] = torch.nan
    dirty = multiply(x, matrix)
    assert dirty[3].isnan().all()
    assert torch.equal(dirty[[0, 1, 2, 4, 5, 6, 7]], clean[[0, 1, 2, 4, 5, 6, 7]])


@pytest.mark.parametrize("dtype", TYPES)
def test_embedding_returns_the_rows_of_the_table(dtype):
    table = randn(70, 34).to(dtype)
    ids = torch.tensor([0, 69, 31, 32, 5, 5, 64])
    packed = pack(table, dtype)
    assert packed.dtype == dtype
    assert torch.equal(CpuDevice(2).embed(ids, packed), table.float()[ids])


@pytest.mark.parametrize("token", [-1, 70, 1 << 40])
def test_a_token_outside_the_table_is_an_error(token):
    with pytest.raises(IndexError, match=f"{token} is outside the table of 70 rows"):
        CpuDevice().embed(torch.tensor([3, token]), pack(randn(70, 4), torch.float32))


def test_no_rows_give_no_rows():
    matrix = pack(randn(7, 5), torch.float32)
    assert multiply(torch.empty(0, 5), matrix).shape == (0, 7)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(
        ValueError, match="use best, baseline, avx2, avx512, avx512_vnni or avx512_bf16"
    ):
        _native.force_isa("avx1024")


def test_threads_that_share_a_device_take_turns():
    device, x = CpuDevice(2), randn(3, 300)
    projection = Projection((pack(randn(500, 300, seed=1), torch.bfloat16),))
    expected = device.linear(x, projection)
    wrong = []

    def work():
        for _ in range(200):
            if not torch.equal(device.linear(x, projection), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_idle_threads_sleep():
    device = CpuDevice(3)
    device.linear(randn(2, 64), Projection((pack(randn(4000, 64), torch.float32),)))
    deadline = time.monotonic() + 20
    while True:
        used, started = time.process_time(), time.monotonic()
        threading.Event().wait(0.05)
        if time.process_time() - used < 0.2 * (time.monotonic() - started):
            return
        assert time.monotonic() < deadline, "a worker spins"

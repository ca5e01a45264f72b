"""The kernels of rows, run on the CPU by the emulation: against float64 formulas, the CPU's
operators where those make the same bits, and a row's bits in other company."""

import math

import pytest
import torch

from aegaeon import _native
from aegaeon.device.packed import TYPE_CODES
from tests.support.device_kv import DeviceKv, Shape, randn
from tests.support.emulated import call, set_schedule

TYPES = [torch.float32, torch.bfloat16, torch.float16]
PARTS = [(0, 0, 1), (1, 3, 17), (2, 15, 2)]


@pytest.fixture(autouse=True, params=[0, 3])
def _schedules(request):
    set_schedule(request.param, False)
    yield
    set_schedule(0, False)


def norm(x, shape, weight, chosen=None, residual=None, added=None):
    rows = shape[0]
    out = torch.full((rows, shape[1] * shape[2]), math.nan)
    sizes = torch.tensor(shape)
    given = x, x.shape[1], sizes, weight, 1e-5, chosen, residual, added
    call("rms_norm", *given, out, False)
    rounded = torch.full(out.shape, math.nan, dtype=torch.bfloat16)
    residual = None if added is None else torch.zeros_like(added)
    summed = None if added is None else torch.empty_like(added)
    given = (x if added is None else added), *given[1:6], residual, summed
    call("rms_norm", *given, rounded, True)
    assert torch.equal(rounded, out.bfloat16())
    return out


def formula(x, shape, weight):
    wide = x[:, : shape[1] * shape[2]].double().view(shape)
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    return normed.flatten(1)


@pytest.mark.parametrize("shape", [(5, 1, 96), (3, 7, 31), (2, 3, 128), (4, 1, 2049), (1, 1, 576)])
def test_rms_norm_is_the_float64_formula_and_a_row_is_its_own(shape):
    x = randn(shape[0], shape[1] * shape[2] + 5, seed=1)
    weight = randn(shape[2], seed=2)
    out = norm(x, shape, weight)
    assert torch.allclose(out.double(), formula(x, shape, weight), atol=1e-5)
    alone = norm(x[-1:].contiguous(), (1, *shape[1:]), weight)
    assert torch.equal(alone[0], out[-1])
    chosen = torch.tensor([shape[0] - 1, 0])
    assert torch.equal(norm(x, (2, *shape[1:]), weight, chosen), out[chosen])


@pytest.mark.parametrize("features", [64, 1000])
def test_a_residual_is_added_before_the_norm_and_kept(features):
    x, residual, weight = (randn(n, features, seed=n) for n in (4, 4, 1))
    residual = residual + 1
    added = residual.clone()
    out = norm(x, (4, 1, features), weight, residual=added, added=added)
    assert torch.equal(added, x + residual)
    assert torch.equal(out, norm(added, (4, 1, features), weight))


@pytest.mark.parametrize("shape", [(1, 7), (3, 300), (2, 1024)])
def test_silu_mul_is_the_float64_formula(shape):
    gate_up = randn(shape[0], 2 * shape[1], seed=3)
    gate_up[0, :3] = torch.tensor([-200.0, 200.0, -1000.0])
    out = torch.full(shape, math.nan)
    call("silu_mul", gate_up, *shape, out, False, None, None)
    rounded = torch.full(shape, math.nan, dtype=torch.bfloat16)
    call("silu_mul", gate_up, *shape, rounded, True, None, None)
    assert torch.equal(rounded, out.bfloat16())
    gate, up = gate_up.double().chunk(2, dim=1)
    expected = gate * torch.sigmoid(gate) * up
    assert ((out.double() - expected).abs() <= 1e-6 * (1 + expected.abs())).all()


def test_silu_mul_finishes_gate_and_up_first():
    gate_up, biases, scales = randn(5, 600, seed=3), randn(600, seed=4), randn(5, seed=5).exp2()
    out, expected = torch.empty(5, 300), torch.empty(5, 300)
    call("silu_mul", gate_up, 5, 300, out, False, scales, biases)
    finished = gate_up * scales[:, None] + biases
    call("silu_mul", finished, 5, 300, expected, False, None, None)
    assert torch.equal(out, expected)


def narrowed(x, dtype):
    out, scales = torch.full(x.shape, math.nan).to(dtype), torch.full((len(x),), math.nan)
    call("narrow_rows", x, x.shape[1], torch.tensor(x.shape), TYPE_CODES[dtype], out, scales)
    return out, scales


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (9, 300), (17, 64)])
def test_rows_are_rounded_to_what_they_are_multiplied_with(shape):
    x = randn(*shape, seed=1) * 100
    assert torch.equal(narrowed(x, torch.bfloat16)[0], x.bfloat16())
    out, scales = narrowed(x, torch.float16)
    assert torch.equal(out, x.half()) and (scales == 1).all()


def test_rows_beyond_float16_are_scaled_by_a_power_of_two_and_others_are_not():
    x = randn(6, 40, seed=2)
    x[1, 7], x[2, 3], x[3, 39], x[4, 0] = 65504.0, -65505.0, 3e38, math.inf
    x[5, 1] = math.nan
    out, scales = narrowed(x, torch.float16)
    assert torch.equal(out[:2], x[:2].half())
    assert scales.tolist()[:3] == [1, 1, 2] and scales[4:].tolist() == [1, 1]
    finite = (out[2:4].double() * scales[2:4, None].double() - x[2:4].double()).abs()
    largest = x[2:4].abs().amax(1, keepdim=True).double()
    assert (finite <= x[2:4].abs().double() * 2**-11 + largest * 2**-38).all()
    assert out[4, 0] == math.inf and out[5].isnan().sum() == 1


def test_rows_are_narrowed_to_halves_only():
    with pytest.raises(RuntimeError, match="narrowed to bf16 or f16"):
        narrowed(randn(1, 4, seed=1), torch.float32)


@pytest.mark.parametrize("ends", [(7, 20, 31), (31, 31, 31), (300, 301, 620)])
@pytest.mark.parametrize("has", [(1, 1, 1), (0, 0, 1), (0, 1, 0), (1, 0, 0)])
def test_products_are_finished_in_this_order(ends, has):
    rows, width = 5, ends[2]
    out, residual, scales = (randn(rows, n, seed=n) for n in (width, width + 1, 1))
    residual, scales = residual[:, :width].contiguous(), scales[:, 0].exp2().contiguous()
    parts = [randn(max(1, end), seed=end) for end in ends]
    biases = [part if has[1] else None for part in parts]
    biases[1] = None
    expected = out * scales[:, None] if has[0] else out.clone()
    begins = (0, *ends)
    for at in (0, 2):
        if has[1]:
            width_of = ends[at] - begins[at]
            expected[:, begins[at] : ends[at]] += parts[at][:width_of]
    expected = expected + residual if has[2] else expected
    given = scales if has[0] else None, residual if has[2] else None
    call("finish_product", out, torch.tensor((rows, width)), *given, torch.tensor(ends), *biases)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("features", [64, 67])
def test_embeddings_are_rows_and_of_no_token_are_no_numbers(features, dtype):
    table = randn(75, features, seed=4).to(dtype)
    ids = torch.tensor([0, 74, 31, 75, -1, 5])
    out = torch.full((6, features), math.nan)
    call("embed", ids, 6, features, table, 75, TYPE_CODES[dtype], out)
    assert torch.equal(out[[0, 1, 2, 5]], table[[0, 74, 31, 5]].float())
    assert out[3:5].isnan().all()


def test_embeddings_of_int8_are_refused():
    nothing = torch.empty(1)
    with pytest.raises(RuntimeError, match="load the table as bf16"):
        call("embed", nothing, 1, 1, nothing, 1, TYPE_CODES[torch.int8], nothing)


def test_rotate_makes_the_cpus_bits():
    x, cos, sin = randn(5, 3 * 20, seed=1), randn(5, 20, seed=2), randn(5, 20, seed=3)
    out, expected = torch.empty(5, 60), torch.empty(5, 60)
    call("rotate", x, torch.tensor([5, 3, 20]), cos, sin, out)
    angles = cos.data_ptr(), sin.data_ptr()
    operand = (x.data_ptr(), 60), (5, 3, 20), angles, expected.data_ptr()
    _native.rotate(_native.ThreadPool(1), *operand)
    assert torch.equal(out, expected)


def rotated(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("is_rotating", [True, False])
@pytest.mark.parametrize("heads", [(6, 2, 64), (3, 1, 80)])
def test_rows_are_appended_where_their_positions_are(heads, is_rotating, dtype):
    kv = DeviceKv([1, 20, 40], Shape(*heads, dtype))
    given, kept = kv.given(PARTS, (30, 0, 0, 0, 0))
    q, k, v = (kv.rows_of(of, PARTS) for of in (kv.q, kv.k, kv.v))
    x = torch.cat((q.flatten(1), k.flatten(1), v.flatten(1)), dim=1)
    x = torch.cat((x, torch.full((30 - len(x), x.shape[1]), math.nan)))
    cos, sin = randn(30, heads[2], seed=5), randn(30, heads[2], seed=6)
    out = torch.full((30, heads[0], heads[2]), math.nan)
    angles = (cos, sin) if is_rotating else (None, None)
    call("append_kv", given, 1, x, 30, *angles, out)
    del kept
    rows = torch.cat([torch.arange(first, first + n) for first, n in kv.places(PARTS)])
    keys = rotated(k, cos[: len(k)], sin[: len(k)]) if is_rotating else k
    kv.k, kv.v = cut(keys, kv), cut(v, kv)
    pages = kv.pages.clone()
    kv.pages.fill_(math.nan)
    kv.write()
    assert torch.equal(pages.nan_to_num(7e4), kv.pages.nan_to_num(7e4))
    if is_rotating:
        assert torch.equal(out[rows], rotated(q, cos[: len(q)], sin[: len(q)])[rows])


def cut(rows, kv):
    """The rows of PARTS as whole sequences; NaN before each part."""
    sequences = []
    for (first, count), (_, start, _) in zip(kv.places(PARTS), PARTS, strict=True):
        before = torch.full((start, *rows.shape[1:]), math.nan)
        sequences.append(torch.cat((before, rows[first : first + count])))
    return sequences


@pytest.mark.parametrize("page_bytes", [2048, 48, 16384])
def test_blocks_go_out_and_come_in_whole(page_bytes):
    pages = randn(40, page_bytes // 4, seed=1)
    blocks = torch.tensor([30, 3, 17], dtype=torch.int32)
    stage = torch.full((3, 6, page_bytes // 4), math.nan)
    call("copy_blocks", pages, page_bytes, 6, blocks, 3, stage, True)
    for at, block in enumerate(blocks.tolist()):
        assert torch.equal(stage[at], pages[block : block + 6])
    kept, stage = pages.clone(), -stage
    call("copy_blocks", pages, page_bytes, 6, blocks, 3, stage, False)
    for at, block in enumerate(blocks.tolist()):
        kept[block : block + 6] = stage[at]
    assert torch.equal(pages, kept)

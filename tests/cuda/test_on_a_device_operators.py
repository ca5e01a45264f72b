"""The operators of a CUDA device against float64 formulas and the CPU's tokens, and the bits of a
row against its company: on the stand-in for one, and on cuda:0."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from aegaeon.device.base import Embedding, Projection, StepInputs
from aegaeon.device.cpu import CpuDevice
from aegaeon.memory.kv import KvShape
from aegaeon.types import SamplingParams
from tests.native.test_sampling import every_params, rows_of_all_kinds
from tests.support.cuda_device import LONG_KINDS, Cuda
from tests.support.paged import PagedSequences
from tests.support.products import randn

TYPES = [torch.float32, torch.bfloat16, torch.float16]
# As the CPU's operators are held.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SCALE = 0.1
LONG = pytest.mark.parametrize("cuda", LONG_KINDS, indirect=True)
# Heads, KV heads, head_dim.
HEADS = [(6, 2, 64), (3, 3, 96), (7, 1, 128), (2, 1, 256)]
FEATURES = 64
EPS = 1e-9


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def start(cuda: Cuda, step, x: Tensor, batch=None, angles=None) -> Tensor:
    """Have `step` begin with the rows x; return where its result will be, each row normed.

    It is run as a model's, and ends as one: the wanted rows of what `step` makes are normed, and
    multiplied, here with the unit matrix. `batch` is of an empty sequence where none is given.
    """
    if batch is None:
        sequences = PagedSequences(KvShape(1, 1, 64), [len(x)], area=cuda.area)
        batch = sequences.batch([(0, 0, len(x))])
    if len(batch.logit_rows) == 0:
        batch = replace(batch, logit_rows=torch.arange(len(x)))
    cos, sin = angles or (torch.ones(len(x), FEATURES), torch.zeros(len(x), FEATURES))
    runner, ends = cuda.operators().new_runner(), {}

    def whole(ops, given, await_stage):
        made = step(ops, given, await_stage)
        width = made.shape[1]
        if width not in ends:
            unit = cuda.matrix(torch.eye(width), torch.float32)
            ends[width] = cuda.put(torch.ones(width)), Projection((unit,))
        ones, unit = ends[width]
        return ops.linear(ops.rms_norm(made, ones, EPS, rows=given.batch.logit_rows), unit)

    runner.prepare(whole, x.shape[1], cos.shape[1])
    return runner.run(whole, StepInputs(x, cos, sin, batch), lambda _: None)


def run(cuda: Cuda, step, x: Tensor, batch=None, angles=None) -> Tensor:
    """Return what `start` comes to."""
    return cuda.get(start(cuda, step, x, batch, angles))


def normed(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def assert_close(made: Tensor, expected: Tensor, tolerance: float) -> None:
    """`expected` is what the operator has to make, of which `made` has the normed rows."""
    expected = normed(expected)
    assert made.dtype == torch.float32 and made.shape == expected.shape
    error = (made.double() - expected).abs() / (1 + expected.abs())
    assert error.max() <= tolerance, float(error.max())


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


# Products

WIDTHS = [(1, 1, 7), (5, 67, 96), (33, 130, 64), (3, 384, 300), (150, 40, 31)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", WIDTHS)  # rows, inputs, outputs
def test_linear_is_the_float64_formula(cuda, shape, dtype):
    rows, inputs, outputs = shape
    sizes = (outputs, 5)
    weights = [(randn(size, inputs, seed=size) / inputs**0.5).to(dtype) for size in sizes]
    biases = [randn(size, seed=9) for size in sizes]
    parts = tuple(cuda.matrix(weight, dtype) for weight in weights)
    projection = Projection(parts, tuple(cuda.put(bias) for bias in biases))
    other = randn(sum(sizes), inputs, seed=3) / inputs**0.5
    added = Projection((cuda.matrix(other, torch.float32),))
    x = randn(rows, inputs, seed=1)

    def step(ops, given, _):
        residual = ops.linear(given.x, added)
        return ops.linear(given.x, projection, residual=residual)

    made = run(cuda, step, x)
    expected = x.double() @ other.double().T
    expected += torch.cat(
        [
            x.double() @ weight.double().T + bias.double()
            for weight, bias in zip(weights, biases, strict=True)
        ],
        dim=1,
    )
    assert_close(made, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("extreme", [(), (-200.0, -90.0, -1000.0)], ids=["plain", "extreme"])
@pytest.mark.parametrize("dtype", TYPES)
def test_gated_is_the_float64_formula(cuda, dtype, extreme):
    weights = [(randn(75, 130, seed=seed) / 12).to(dtype) for seed in (1, 2)]
    biases = [randn(75, seed=3), randn(75, seed=4)]
    # Where exp leaves what floats hold, too.
    biases[0][[3, 40, 74][: len(extreme)]] = torch.tensor(extreme)
    parts = tuple(cuda.matrix(weight, dtype) for weight in weights)
    projection = Projection(parts, tuple(cuda.put(bias) for bias in biases))
    for rows in (1, 7, 30):
        x = randn(rows, 130, seed=rows)
        made = run(cuda, lambda ops, given, _: ops.gated(given.x, projection), x)
        gate, up = (
            x.double() @ weight.double().T + bias.double()
            for weight, bias in zip(weights, biases, strict=True)
        )
        assert_close(made, gate * torch.sigmoid(gate) * up, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TYPES)
def test_products_of_a_row_have_the_same_bits_in_any_company(cuda, dtype):
    parts = tuple(cuda.matrix(randn(75, 130, seed=seed), dtype) for seed in (1, 2))
    projection = Projection(parts)
    x = randn(300, 130, seed=5)
    for name in ("linear", "gated"):

        def step(ops, given, _, name=name):
            return getattr(ops, name)(given.x, projection)

        whole = run(cuda, step, x)
        for first, rows in ((0, 1), (7, 3), (100, 17), (171, 129), (299, 1)):
            alone = run(cuda, step, x[first : first + rows])
            assert same_bits(alone, whole[first : first + rows]), (name, first, rows)


# Rows


@pytest.mark.parametrize("shape", [(5, 1, 96), (3, 7, 31), (2, 3, 128), (4, 1, 2049), (1, 1, 576)])
def test_rms_norm_is_the_float64_formula_and_a_row_is_its_own(cuda, shape):
    rows, heads, features = shape
    x, weight = randn(rows, heads * features, seed=1), randn(features, seed=2)
    there = cuda.put(weight)

    def step(ops, given, _):
        seen = given.x.view(-1, heads, features) if heads > 1 else given.x
        return ops.rms_norm(seen, there, 1e-5).view(-1, heads * features)

    made = run(cuda, step, x)
    wide = x.double().view(rows, heads, features)
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert_close(made, expected.flatten(1), 1e-5)
    assert torch.equal(run(cuda, step, x[-1:])[0], made[-1])


def test_rows_whose_logits_are_wanted_are_normed_alone(cuda):
    x, weight = randn(6, 96, seed=1), cuda.put(randn(96, seed=2))
    chosen = torch.tensor([5, 0, 3])

    def step(ops, given, _):
        return ops.rms_norm(given.x, weight, 1e-5)

    sequences = PagedSequences(KvShape(1, 1, 64), [6], area=cuda.area)
    batch = replace(sequences.batch([(0, 0, 6)]), logit_rows=chosen)
    made = run(cuda, step, x, batch)
    assert torch.equal(made, run(cuda, step, x)[chosen])


@pytest.mark.parametrize("heads", [(3, 64), (1, 96), (5, 20)])
def test_rotate_turns_half_split_pairs(cuda, heads):
    count, head_dim = heads
    x, angle = randn(9, count * head_dim), randn(9, head_dim // 2, seed=1).double()
    cos, sin = torch.cos(angle), torch.sin(angle)
    angles = torch.cat((cos, cos), 1).float(), torch.cat((sin, sin), 1).float()

    def step(ops, given, _):
        turned = ops.rotate(given.x.view(-1, count, head_dim), given.cos, given.sin)
        return turned.view(-1, count * head_dim)

    made = run(cuda, step, x, angles=angles)
    a, b = x.double().view(9, count, head_dim).chunk(2, dim=-1)
    c, s = cos[:, None], sin[:, None]
    expected = torch.cat((a * c - b * s, b * c + a * s), dim=-1)
    assert_close(made, expected.flatten(1), 1e-6)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("features", [64, 67])
def test_embeddings_are_rows_and_of_no_token_are_no_numbers(cuda, features, dtype):
    table = randn(75, features, seed=4).to(dtype)
    ids = torch.tensor([0, 74, 31, 75, -1, 5])
    sequences = PagedSequences(KvShape(1, 1, 64), [6], area=cuda.area)
    batch = replace(sequences.batch([(0, 0, 6)]), logit_rows=torch.arange(6))
    ones, eps = cuda.put(torch.ones(features)), 1e-6
    angles = torch.ones(6, FEATURES), torch.zeros(6, FEATURES)
    same = Projection((cuda.matrix(torch.eye(features), torch.float32),))

    def step(ops, given, _):
        return ops.linear(ops.rms_norm(given.x, ones, eps, rows=given.batch.logit_rows), same)

    runner, embedding = cuda.operators().new_runner(), Embedding(ids, cuda.matrix(table, dtype))
    runner.prepare(step, features, FEATURES)
    made = cuda.get(runner.run_tokens(step, embedding, angles, batch, lambda _: None))
    rows = table[[0, 74, 31, 5]].double()
    expected = rows / (rows.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    assert (made[[0, 1, 2, 5]].double() - expected).abs().max() < 1e-5
    assert made[3:5].isnan().all()


# Attention


class Attention:
    """Sequences with random keys and values on the device, attended in any cut; what nobody wrote
    is NaN."""

    def __init__(self, cuda, lengths, heads, dtype):
        self.cuda, self.heads = cuda, heads
        count, kv_heads, head_dim = heads
        self.shape = KvShape(2, kv_heads, head_dim, dtype)
        self.sequences = PagedSequences(self.shape, lengths, area=cuda.area)
        self.sequences.pool.pages(self.shape).fill_(math.nan)
        cuda.settle()
        self.q = [randn(n, count, head_dim, seed=100 + i) for i, n in enumerate(lengths)]
        self.k = [randn(n, kv_heads, head_dim, seed=200 + i) for i, n in enumerate(lengths)]
        self.v = [randn(n, kv_heads, head_dim, seed=300 + i) for i, n in enumerate(lengths)]

    def start(self, parts, layer=1):
        """Begin with the rows (sequence, start, rows) of `parts`, behind what was appended."""
        count, kv_heads, head_dim = self.heads
        x = torch.cat([cut(of, parts) for of in (self.q, self.k, self.v)], dim=1)

        def step(ops, given, _):
            qkv = given.x.view(-1, count + 2 * kv_heads, head_dim)
            queries, keys, values = qkv.split((count, kv_heads, kv_heads), dim=1)
            ops.append_kv(layer, keys, values, given.batch)
            # Not at all, but as what queries are.
            queries = ops.rotate(queries, given.cos, given.sin)
            return ops.attend(layer, queries, given.batch, SCALE)

        angles = torch.ones(len(x), head_dim), torch.zeros(len(x), head_dim)
        return start(self.cuda, step, x.flatten(1), self.sequences.batch(parts), angles)

    def run(self, parts, layer=1):
        """Return the rows of `parts`."""
        return self.cuda.get(self.start(parts, layer))

    def expected(self, parts):
        """The formula, in float64 from what the pages hold."""
        return torch.cat([self._expected(*part) for part in parts])

    def _expected(self, sequence, start, rows):
        end = start + rows
        q = self.q[sequence][start:end].double()
        k, v = (of[sequence][:end].to(self.shape.dtype).double() for of in (self.k, self.v))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * SCALE
        hidden = torch.ones(scores.shape[1:]).triu(1 + start).bool()
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return torch.einsum("hij,jhd->ihd", weights, v).flatten(1)


def cut(of, parts):
    return torch.cat([of[s][start : start + rows] for s, start, rows in parts])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_attention_is_the_float64_formula(cuda, heads, dtype):
    attention = Attention(cuda, [1, 16, 45, 150], heads, dtype)
    whole = [(0, 0, 1), (1, 0, 16), (2, 0, 45), (3, 0, 150)]
    assert_close(attention.run(whole), attention.expected(whole), TOLERANCE[dtype])
    # Decoded and extended in one pass.
    mixed = [(0, 0, 1), (3, 149, 1), (2, 3, 42), (1, 15, 1)]
    assert_close(attention.run(mixed), attention.expected(mixed), TOLERANCE[dtype])


@LONG
@pytest.mark.parametrize("dtype", TYPES)
def test_long_contexts_are_the_float64_formula_however_far_scores_lie_apart(cuda, dtype):
    attention = Attention(cuda, [1300], (3, 1, 64), dtype)
    attention.q[0] *= torch.logspace(-3, 1, 1300)[:, None, None]
    # What a score of tens is rounded by, its weight is off by.
    for part in ((0, 0, 1000), (0, 1000, 299), (0, 1299, 1)):
        assert_close(attention.run([part]), attention.expected([part]), 5 * TOLERANCE[dtype])


@LONG
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("heads", [(3, 1, 64), (1, 1, 256)])
def test_attention_has_the_same_bits_prefilled_chunked_or_decoded(cuda, heads, dtype):
    attention = Attention(cuda, [600], heads, dtype)
    whole = attention.run([(0, 0, 600)])
    for start, rows in [(0, 1), (15, 1), (31, 2), (511, 1), (510, 4), (524, 76), (599, 1)]:
        part = attention.run([(0, start, rows)])
        assert same_bits(part, whole[start : start + rows]), (start, rows)


@LONG
@pytest.mark.parametrize("dtype", TYPES)
def test_attention_has_the_same_bits_in_any_company(cuda, dtype):
    lengths = [700, 20, 258, 530]
    attention = Attention(cuda, lengths, (4, 2, 96), dtype)
    alone = [attention.run([(i, 0, n)]) for i, n in enumerate(lengths)]
    parts = [(0, 699, 1), (1, 0, 20), (2, 200, 58), (3, 528, 2)]
    expected = torch.cat([alone[i][start : start + rows] for i, start, rows in parts])
    assert same_bits(attention.run(parts), expected)
    assert same_bits(attention.run(parts[::-1])[:2], expected[-2:])


@LONG
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_sequence_and_behind_its_token(cuda, bad, dtype):
    attention = Attention(cuda, [300, 300], (4, 2, 64), dtype)
    parts = [(0, 200, 100), (1, 299, 1)]
    attention.run([(0, 0, 300), (1, 0, 300)])
    clean = attention.run(parts)
    attention.k[0][255, 0, 0] = attention.v[0][255, 0, 0] = bad
    dirty = attention.run(parts)
    assert same_bits(dirty[:55], clean[:55])
    assert not dirty[55:100].isfinite().all(dim=1).any()
    assert same_bits(dirty[100], clean[100])


def test_a_copy_out_has_what_was_computed_before_it(cuda):
    attention = Attention(cuda, [40], (2, 1, 64), torch.float32)
    engine, shape = cuda.copy_engine(1 << 20), attention.shape
    pages = attention.sequences.pool.pages(shape)
    block = attention.sequences.blocks[0][0]
    found = torch.empty(shape.block_pages, 16, 64)
    there = pages.data_ptr() + block * shape.page_bytes
    attention.start([(0, 0, 40)])
    # Nobody waits in between.
    out = engine.submit([(found.data_ptr(), there, shape.block_bytes)], 0, is_outward=True)
    assert out.wait(timeout_s=20.0), out.failure
    assert torch.equal(found[2], attention.k[0][:16, 0])
    assert torch.equal(found[3], attention.v[0][:16, 0])


# Sampling


@pytest.mark.parametrize("vocab", [1, 65, 1300])
def test_tokens_are_the_cpus_for_the_same_logits(cuda, vocab):
    rng = np.random.default_rng(vocab)
    rows = rows_of_all_kinds(vocab, 1)
    operators, cpu = cuda.operators(), CpuDevice()
    for _ in range(3):
        draws = [(every_params(vocab, rng), int(rng.integers(1 << 20))) for _ in rows]
        logits = torch.from_numpy(rows)
        assert operators.sample(cuda.put(logits), draws) == cpu.sample(logits, draws), draws


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_has_no_token_and_spoils_no_other(cuda, bad):
    logits = torch.from_numpy(np.tile(rows_of_all_kinds(600, 2)[0], (4, 1)))
    logits[1, 555] = logits[2, 3] = bad
    draws = [(SamplingParams(temperature=t, top_p=0.9), 0) for t in (0.0, 0.0, 1.0, 1.0)]
    tokens = cuda.operators().sample(cuda.put(logits), draws)
    assert tokens == CpuDevice().sample(logits, draws)
    assert [token is None for token in tokens] == [False, True, True, False]


def test_without_rows_there_are_no_tokens(cuda):
    assert cuda.operators().sample(cuda.put(torch.empty(0, 50)), []) == []

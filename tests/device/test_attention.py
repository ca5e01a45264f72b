"""Attention over paged keys and values: the float64 formula on every instruction set, in both types
of KV, and the bits of a row against its company, its cut and the threads."""

import math

import pytest
import torch
from torch import Tensor

from aegaeon import _native
from aegaeon.device.cpu import CpuDevice
from aegaeon.memory.kv import BLOCK_TOKENS, KvShape
from tests.support.instruction_sets import FUSED, ISAS
from tests.support.paged import PagedSequences
from tests.support.products import randn

TYPES = [torch.float32, torch.bfloat16]
SCALE = 0.25
# Heads, KV heads, head_dim: groups of every size, elements that fill no vector, an odd number.
SHAPES = [
    *((6, 2, 16), (4, 4, 64), (9, 3, 96), (7, 1, 128), (14, 2, 80)),
    *((2, 2, 256), (13, 1, 20), (4, 2, 2), (5, 5, 31), (3, 1, 1)),
]


class Attention:
    """Sequences with random keys and values, attended in any cut; what nobody wrote is NaN."""

    def __init__(self, lengths, shape=(6, 2, 16), dtype=torch.float32, threads=1):
        heads, kv_heads, head_dim = shape
        self.shape = KvShape(2, kv_heads, head_dim, dtype)
        self.sequences = PagedSequences(self.shape, lengths)
        self.pages = self.sequences.pool.pages(self.shape)
        for block in (block for blocks in self.sequences.blocks for block in blocks):
            self.pages[block : block + self.shape.block_pages] = math.nan
        self.q = [randn(n, heads, head_dim, seed=100 + i) for i, n in enumerate(lengths)]
        self.k = [randn(n, kv_heads, head_dim, seed=200 + i) for i, n in enumerate(lengths)]
        self.v = [randn(n, kv_heads, head_dim, seed=300 + i) for i, n in enumerate(lengths)]
        self.device = CpuDevice(threads)

    def append(self, parts, layer=1):
        batch = self.sequences.batch(parts)
        keys, values = (self._cut(of, parts) for of in (self.k, self.v))
        self.device.append_kv(layer, keys, values, batch)
        return batch

    def run(self, parts, layer=1):
        """Return the rows (sequence, start, rows) of `parts`, behind what was appended before."""
        batch = self.append(parts, layer)
        return self.device.attend(layer, self._cut(self.q, parts), batch, SCALE)

    def expected(self, sequence):
        """The formula, in float64 from what the pages hold."""
        q = self.q[sequence].double()
        k, v = (of[sequence].to(self.shape.dtype).double() for of in (self.k, self.v))
        per_head = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(per_head, dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * SCALE
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
        return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)

    def _cut(self, of, parts):
        return torch.cat([of[s][start : start + rows] for s, start, rows in parts])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_the_float64_formula(shape, dtype, isa):
    _native.force_isa(isa)
    lengths = [1, 16, 45, 530]
    attention = Attention(lengths, shape, dtype)
    out = attention.run([(i, 0, length) for i, length in enumerate(lengths)])
    expected = torch.cat([attention.expected(i) for i in range(len(lengths))])
    assert torch.allclose(out.double(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
def test_long_contexts_are_the_float64_formula_however_far_scores_lie_apart(dtype):
    attention = Attention([2100], (4, 2, 64), dtype)
    attention.q[0] *= torch.logspace(-3, 1.5, 2100)[:, None, None]
    out = attention.run([(0, 0, 2100)])
    expected = attention.expected(0)
    # What a score of a hundred is rounded by, its weight is off by.
    assert torch.allclose(out.double(), expected, atol=2e-4)
    assert torch.allclose(out[:1000].double(), expected[:1000], atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(6, 2, 16), (14, 2, 64), (4, 4, 80), (3, 1, 128)])
def test_attention_has_the_same_bits_prefilled_chunked_or_decoded(shape, dtype):
    attention = Attention([1100], shape, dtype)
    whole = attention.run([(0, 0, 1100)])
    for step in (1, 3, 100, 511, 600):
        starts = range(0, 1100, step)
        if step == 1:
            starts = [0, 1, 2, 5, 15, 16, 17, 255, 510, 511, 512, 513, 1023, 1024, 1099]
        for start in starts:
            rows = min(step, 1100 - start)
            out = attention.run([(0, start, rows)])
            assert same_bits(out, whole[start : start + rows]), (step, start)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(9, 3, 64), (8, 1, 128)])
def test_attention_has_the_same_bits_among_other_sequences_and_on_any_threads(shape, dtype):
    lengths = [700, 20, 258, 5000, 1, 1025]
    attention = Attention(lengths, shape, dtype)
    alone = [attention.run([(i, 0, n)]) for i, n in enumerate(lengths)]
    last = [(i, n - 1, 1) for i, n in enumerate(lengths)]
    mixed = [(1, 19, 1), (0, 640, 60), (3, 4998, 2), (2, 0, 258)]
    expected = torch.cat([alone[i][start : start + rows] for i, start, rows in mixed])
    for threads in (1, 2, 5):
        attention.device = CpuDevice(threads)
        together = attention.run(last)
        for i, row in enumerate(together):
            assert same_bits(row, alone[i][-1]), (threads, i)
            assert same_bits(attention.run([last[i]])[0], row), (threads, i)
        assert same_bits(attention.run(mixed), expected), threads


@pytest.mark.skipif(len(FUSED) < 2, reason="one instruction set at most that fuses")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(9, 3, 64), (14, 2, 80), (4, 4, 31)])
def test_instruction_sets_that_fuse_agree_to_the_bit(shape, dtype):
    attention = Attention([600], shape, dtype)
    results = []
    for isa in FUSED:
        _native.force_isa(isa)
        results.append(attention.run([(0, 0, 600)]))
    assert all(same_bits(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_in_a_sequence_stays_in_it_and_behind_its_token(bad, dtype, isa):
    _native.force_isa(isa)
    parts = [(0, 500, 100), (1, 599, 1)]
    attention = Attention([600, 600], (4, 2, 64), dtype)
    attention.append([(0, 0, 600), (1, 0, 600)])
    clean = attention.run(parts)
    attention.k[0][555, 0, 0] = attention.v[0][555, 0, 0] = bad
    dirty = attention.run(parts)
    assert same_bits(dirty[:55], clean[:55])
    assert not dirty[55:100].isfinite().all(dim=1).any()
    assert same_bits(dirty[100], clean[100])


def test_keys_and_values_are_rounded_half_to_even():
    halves = [1.0, 1.00390625, 1.01171875, -1.01171875, 1.003907, 3.4e38, -3.4e38, 1e-40, -0.0]
    special = torch.tensor([*halves, math.nan, math.inf, -math.inf, 9.2e-41, 0.1, -7.3, 65504.0])
    attention = Attention([1], (1, 1, 16), torch.bfloat16)
    attention.k[0][0, 0], attention.v[0][0, 0] = special, special.flip(0)
    attention.append([(0, 0, 1)], layer=0)
    block = attention.sequences.blocks[0][0]
    # Keys: [head_dim / 2][tokens][2].
    keys = attention.pages[block].reshape(8, BLOCK_TOKENS, 2)[:, 0].flatten()
    values = attention.pages[block + 1][0]
    for stored, given in ((keys, special), (values, special.flip(0))):
        expected = given.bfloat16()
        nan = expected.isnan()
        assert torch.equal(stored.isnan(), nan)
        assert torch.equal(stored[~nan].view(torch.int16), expected[~nan].view(torch.int16))


@pytest.mark.parametrize("dtype", TYPES)
def test_many_sequences_are_stored_and_attended_to_alike_on_any_threads(dtype):
    lengths = [1 + 7 * i % 40 for i in range(30)]
    parts = [(i, max(0, n - 1 - i % 3), min(n, 1 + i % 3)) for i, n in enumerate(lengths)]
    outs = []
    for threads in (1, 4):
        attention = Attention(lengths, dtype=dtype, threads=threads)
        attention.run([(i, 0, n) for i, n in enumerate(lengths)])
        outs.append(attention.run(parts, layer=0))
    assert same_bits(*outs)

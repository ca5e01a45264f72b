"""The CPU operators against float64 formulas, and the bits of a row against its company."""

import math

import pytest
import torch
from torch import Tensor

from aegaeon.device.base import Projection
from aegaeon.device.cpu import CpuDevice
from aegaeon.device.packed import pack
from aegaeon.memory.kv import KvShape
from tests.support.paged import PagedSequences

ROW_COUNTS = (1, 2, 3, 5, 8, 17, 33, 64, 129, 344)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operators(features: int):
    device = CpuDevice()
    weight, bias = randn(200, features, seed=1), randn(200, seed=2)
    projection = Projection((pack(weight, torch.bfloat16),), (bias,))
    up = randn(400, features, seed=3)
    cos, sin = randn(400, 16, seed=4), randn(400, 16, seed=5)
    heads = features // 16
    return {
        "linear": lambda x, at: device.linear(x, projection),
        "rms_norm": lambda x, at: device.rms_norm(x, weight[0], 1e-6),
        "head_norm": lambda x, at: device.rms_norm(x.view(-1, heads, 16), weight[0, :16], 1e-6),
        "rotate": lambda x, at: device.rotate(x.view(-1, heads, 16), cos[at], sin[at]),
        "silu_mul": lambda x, at: device.silu_mul(x, up[at]),
    }


@pytest.mark.parametrize("features", [64, 96, 576])
@pytest.mark.parametrize("name", ["linear", "rms_norm", "head_norm", "rotate", "silu_mul"])
def test_rows_have_the_same_bits_in_any_company(name, features):
    operator = operators(features)[name]
    x = randn(400, features, seed=9)
    whole = operator(x, slice(0, 400))
    for count in ROW_COUNTS:
        for first in (0, 7, 400 - count):
            rows = slice(first, first + count)
            if first + count <= 400:
                assert torch.equal(operator(x[rows], rows), whole[rows]), (count, first)


def test_rms_norm_is_the_float64_formula():
    x, weight = randn(5, 96), randn(96, seed=1)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert torch.allclose(CpuDevice().rms_norm(x, weight, 1e-5).double(), expected, atol=1e-6)


def test_rotate_turns_half_split_pairs():
    x, angle = randn(5, 3, 16), randn(5, 8, seed=1).double()
    cos, sin = torch.cos(angle), torch.sin(angle)
    a, b = x.double()[..., :8], x.double()[..., 8:]
    c, s = cos[:, None], sin[:, None]
    expected = torch.cat((a * c - b * s, b * c + a * s), dim=-1)
    turned = CpuDevice().rotate(
        x, torch.cat((cos, cos), 1).float(), torch.cat((sin, sin), 1).float()
    )
    assert torch.allclose(turned.double(), expected, atol=1e-6)


def test_silu_mul_is_the_float64_formula_at_the_extremes_too():
    gate = torch.cat((randn(93) * 5, torch.tensor([-200.0, 0.0, 200.0])))[None]
    up = randn(1, 96, seed=1)
    expected = gate.double() * torch.sigmoid(gate.double()) * up.double()
    assert torch.allclose(CpuDevice().silu_mul(gate, up).double(), expected, atol=1e-5)


class Attention:
    """Sequences with random keys and values, attended in any cut."""

    def __init__(self, lengths, heads=6, kv_heads=2, head_dim=16, layers=2, threads=1):
        self.shape = KvShape(layers, kv_heads, head_dim)
        self.sequences = PagedSequences(self.shape, lengths)
        self.q = [randn(n, heads, head_dim, seed=100 + i) for i, n in enumerate(lengths)]
        self.k = [randn(n, kv_heads, head_dim, seed=200 + i) for i, n in enumerate(lengths)]
        self.v = [randn(n, kv_heads, head_dim, seed=300 + i) for i, n in enumerate(lengths)]
        self.device = CpuDevice(threads)

    def run(self, parts, layer=1):
        batch = self.sequences.batch(parts)

        def cut(of):
            return torch.cat([of[s][start : start + rows] for s, start, rows in parts])

        self.device.append_kv(layer, cut(self.k), cut(self.v), batch)
        return self.device.attend(layer, cut(self.q), batch, 0.25)

    def expected(self, sequence):
        q, k, v = (x[sequence].double() for x in (self.q, self.k, self.v))
        per_head = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(per_head, dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * 0.25
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
        return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (9, 3), (7, 1), (14, 2)])
def test_attention_is_the_float64_formula(heads, kv_heads):
    attention = Attention([1, 16, 300, 530], heads=heads, kv_heads=kv_heads)
    out = attention.run([(0, 0, 1), (1, 0, 16), (2, 0, 300), (3, 0, 530)])
    expected = torch.cat([attention.expected(i) for i in range(4)])
    assert torch.allclose(out.double(), expected, atol=1e-5)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_attention_has_the_same_bits_prefilled_chunked_or_decoded(head_dim):
    attention = Attention([530], heads=6, kv_heads=2, head_dim=head_dim)
    whole = attention.run([(0, 0, 530)])
    for step in (1, 3, 100, 256, 511):
        starts = range(0, 530, step)
        if step == 1:
            starts = [0, 1, 2, 5, 15, 16, 17, 127, 128, 254, 255, 256, 257, 511, 512, 513, 529]
        for start in starts:
            rows = min(step, 530 - start)
            out = attention.run([(0, start, rows)])
            assert torch.equal(out, whole[start : start + rows]), (step, start)


def test_attention_has_the_same_bits_among_other_sequences():
    lengths = [700, 20, 258, 513, 1, 90]
    attention = Attention(lengths, heads=9, kv_heads=3, head_dim=64)
    alone = [attention.run([(i, 0, n)]) for i, n in enumerate(lengths)]
    together = attention.run([(i, n - 1, 1) for i, n in enumerate(lengths)])
    for i, row in enumerate(together):
        assert torch.equal(row, alone[i][-1]), i
    mixed = attention.run([(1, 19, 1), (0, 640, 60), (3, 512, 1), (2, 0, 258)])
    assert torch.equal(mixed[1:61], alone[0][640:])
    assert torch.equal(mixed[61], alone[3][512])
    assert torch.equal(mixed[62:], alone[2])


def test_many_sequences_are_stored_and_attended_to_alike_on_any_threads():
    lengths = [1 + 7 * i % 40 for i in range(30)]
    parts = [(i, max(0, n - 1 - i % 3), min(n, 1 + i % 3)) for i, n in enumerate(lengths)]
    outs = []
    for threads in (1, 4):
        attention = Attention(lengths, threads=threads)
        attention.run([(i, 0, n) for i, n in enumerate(lengths)])
        outs.append(attention.run(parts, layer=0))
        pages = attention.sequences.pool.pages(attention.shape)
        outs[-1] = torch.cat((outs[-1].flatten(), pages.flatten()))
    assert torch.equal(*outs)


def test_a_nan_in_one_sequence_stays_in_it():
    attention = Attention([40, 40])
    clean = attention.run([(0, 39, 1), (1, 39, 1)])
    attention.k[0][39, 0, 0] = math.nan
    dirty = attention.run([(0, 39, 1), (1, 39, 1)])
    assert dirty[0].isnan().any()
    assert torch.equal(dirty[1], clean[1])

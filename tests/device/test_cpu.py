"""The CPU operators against float64 formulas, and the bits of a row against its company."""

import pytest
import torch

from aegaeon import _native
from aegaeon.device.base import Projection
from aegaeon.device.cpu import CpuDevice
from aegaeon.device.packed import pack
from tests.support.instruction_sets import ISAS
from tests.support.products import randn

ROW_COUNTS = (1, 2, 3, 5, 8, 17, 33, 64, 129, 344)


def operators(features: int):
    device = CpuDevice()
    weight, bias = randn(200, features, seed=1), randn(200, seed=2)
    projection = Projection((pack(weight, torch.bfloat16),), (bias,))
    gate_up = Projection(tuple(pack(randn(99, features, seed=3), torch.bfloat16) for _ in range(2)))
    cos, sin = randn(400, 16, seed=4), randn(400, 16, seed=5)
    heads = features // 16
    return {
        "linear": lambda x, at: device.linear(x, projection),
        "rms_norm": lambda x, at: device.rms_norm(x, weight[0], 1e-6),
        "head_norm": lambda x, at: device.rms_norm(x.view(-1, heads, 16), weight[0, :16], 1e-6),
        "rotate": lambda x, at: device.rotate(x.view(-1, heads, 16), cos[at], sin[at]),
        "gated": lambda x, at: device.gated(x, gate_up),
    }


@pytest.mark.parametrize("features", [64, 96, 576])
@pytest.mark.parametrize("name", ["linear", "rms_norm", "head_norm", "rotate", "gated"])
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


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_gated_is_the_formula_of_what_linear_makes(dtype, isa):
    _native.force_isa(isa)
    weights, biases = [randn(75, 130, seed=s) for s in (1, 2)], (randn(75, seed=3), randn(75))
    # Where exp leaves what floats hold, too.
    biases[0][[3, 40, 74]] = torch.tensor([-200.0, 200.0, -1000.0])
    projection = Projection(tuple(pack(weight, dtype) for weight in weights), biases)
    for rows in (1, 2, 7, 30, 300):
        x = randn(rows, 130, seed=rows)
        gate, up = CpuDevice().linear(x, projection).double().chunk(2, dim=1)
        expected = gate * torch.sigmoid(gate) * up
        out = CpuDevice(3).gated(x, projection)
        assert out.shape == (rows, 75)
        assert ((out.double() - expected).abs() <= 1e-6 * (1 + expected.abs())).all()
        assert torch.equal(out, CpuDevice().gated(x, projection))


def test_a_gate_of_another_width_is_refused():
    parts = tuple(pack(randn(outputs, 8), torch.float32) for outputs in (5, 6))
    with pytest.raises(ValueError, match="two parts of as many outputs"):
        CpuDevice().gated(randn(2, 8), Projection(parts))

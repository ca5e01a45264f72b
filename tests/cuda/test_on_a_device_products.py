"""Products as the device's library makes them, of the shapes that models have: that a row has the
same bits at any place of a tile, whatever lies beside it. Small ones on a stand-in for a device."""

import math

import pytest
import torch

from tests.support.cuda_device import DEVICE, STAND_IN
from tests.support.products import randn

TYPES = [torch.float32, torch.bfloat16, torch.float16]
# Inputs and outputs.
SHAPES = [(4096, 1024), (4096, 4096), (8192, 1024), (8192, 4096)]
CASES = [
    pytest.param(STAND_IN, (130, 75), id="stand-in"),
    *(
        pytest.param(DEVICE, shape, marks=pytest.mark.cuda, id=f"cuda:0-{shape[0]}x{shape[1]}")
        for shape in SHAPES
    ),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("cuda", "shape"), CASES, indirect=["cuda"])
def test_the_bits_of_a_row_do_not_depend_on_its_place_in_a_tile(cuda, shape, dtype):
    inputs, outputs = shape
    products = cuda.operators().compute.products
    tile = products.tile_rows(dtype)
    weight = (randn(outputs, inputs, seed=1) / inputs**0.5).to(dtype)
    row, there = randn(inputs, seed=2).to(dtype), cuda.put(weight)
    made = []
    # Of 128 rows: 0, 63, 64 and 127. Beside it are other rows, or what nobody reads.
    for seed, place in enumerate((0, tile // 2 - 1, tile // 2, tile - 1)):
        company = randn(tile, inputs, seed=10 + seed).to(dtype)
        for x in (company, torch.full_like(company, math.nan), torch.zeros_like(company)):
            x[place] = row
            given, out = cuda.put(x), cuda.put(torch.zeros(tile, outputs))
            with products.on_stream(cuda.device.stream):
                products.multiply(given, there, out)
            made.append(cuda.get(out)[place])
    expected = weight.double() @ row.double()
    assert ((made[0].double() - expected).abs() / (1 + expected.abs())).max() <= 1e-5
    for one in made:
        assert torch.equal(one.view(torch.int32), made[0].view(torch.int32))

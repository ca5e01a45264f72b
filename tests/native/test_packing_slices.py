"""Tensors longer than what is packed at a time, and tiles wider than that, held against numpy."""

import numpy as np
import pytest

from aegaeon import _native
from tests.support.weight_files import planned

ROWS, TILES = 0, 1
AS_IS, FROM_BF16 = 0, 1
TILE_ROWS, ALIGNMENT_BYTES = 32, 64


def tiled(matrix):
    rows, columns = matrix.shape
    full = np.zeros((-(-rows // TILE_ROWS) * TILE_ROWS, columns), matrix.dtype)
    full[:rows] = matrix
    return np.ascontiguousarray(full.reshape(-1, TILE_ROWS, columns).transpose(0, 2, 1))


def widened(halves):
    return (halves.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize(
    ("shape", "layout", "convert"),
    [
        ((1000, 1024), TILES, AS_IS),  # slices of two tiles, the last one partial
        ((70, 9000), TILES, AS_IS),  # a tile is wider than a slice
        ((1, 1_500_001), ROWS, FROM_BF16),  # slices of a vector
        ((300, 777), TILES, FROM_BF16),
        ((1, 3_000_000), ROWS, AS_IS),  # more than a chunk
    ],
)
def test_every_slice_lands_in_its_place(tmp_path, region_path, shape, layout, convert):
    halves = np.random.default_rng(0).integers(0, 1 << 15, shape).astype(np.uint16)
    file = tmp_path / "weights"
    file.write_bytes(b"?" * 100 + halves.tobytes())
    expected = widened(halves) if convert else halves
    expected = tiled(expected) if layout == TILES else expected
    rows = shape[0]
    job = (planned(file), 100, halves.nbytes, rows, halves.nbytes // rows, 2, layout, 0, 0, convert)
    cache = _native.WeightCache.open_or_create(region_path, 1 << 28)
    model = cache.acquire(b"k" * 32, "m", expected.nbytes, 1, 1.0)
    model.load([job], 2)
    assert bytes(memoryview(model)) == expected.tobytes()
    model.close()
    cache.evict(b"k" * 32)
    cache.close()

"""Memory for keys and values that is there before anybody uses it."""

import time
from pathlib import Path

import pytest

from aegaeon.errors import RegionError
from aegaeon.memory.kv import KvPool, KvShape
from tests.support.regions import own_regions

SHAPE = KvShape(2, 2, 16)
SHAPES = (SHAPE, KvShape(3, 1, 80))
BUDGET = 16 << 20


@pytest.fixture
def path():
    with own_regions() as regions:
        yield regions.kv


def reserved_bytes(path: str) -> int:
    return Path(f"{path}+arena").stat().st_blocks * 512


def await_bytes(path: str, least: int) -> None:
    give_up_s = time.monotonic() + 30
    while reserved_bytes(path) < least:
        assert time.monotonic() < give_up_s
        time.sleep(0.001)


def test_memory_comes_ahead_of_use_while_blocks_change_hands(path):
    pool, other = KvPool(BUDGET, SHAPES, path), KvPool(BUDGET, SHAPES, path)
    pool.back_ahead(BUDGET)
    give_up_s = time.monotonic() + 30
    while reserved_bytes(path) < pool.slab_count * pool.slab_bytes:
        assert time.monotonic() < give_up_s
        blocks = other.allocate(SHAPE, 300)
        for block in blocks:
            pages = other.pages(SHAPE)[block : block + SHAPE.block_pages]
            pages[:] = 3.0
            assert pages.eq(3.0).all()
        other.free(SHAPE, blocks, is_poisoned=True)
    for block in pool.allocate(SHAPE, pool.capacity_blocks(SHAPE)):
        assert not pool.pages(SHAPE)[block : block + SHAPE.block_pages].any()


def test_memory_keeps_so_far_ahead_of_use_and_no_farther(path):
    pool = KvPool(BUDGET, SHAPES, path)
    pool.back_ahead(1 << 20)
    await_bytes(path, 1 << 20)
    slab_blocks = pool.slab_blocks(SHAPE)
    for slabs in range(1, 4):
        pool.allocate(SHAPE, slab_blocks)
        await_bytes(path, (1 << 20) + slabs * pool.slab_bytes)
    assert reserved_bytes(path) <= (1 << 20) + 5 * pool.slab_bytes


def test_a_pool_that_closes_stops_backing(path):
    pool = KvPool(16 * BUDGET, SHAPES, path)
    pool.back_ahead(16 * BUDGET)
    pool.close()
    pool.close()
    assert reserved_bytes(path) < 8 * BUDGET
    with pytest.raises(RegionError, match="closed"):
        pool._native.back_next(1)

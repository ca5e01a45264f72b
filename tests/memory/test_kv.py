"""The pool gives no byte twice, takes everything back, and says no with numbers."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon.errors import BudgetTooSmall, OutOfBlocks, RegionError
from aegaeon.memory.area import Area, Locks
from aegaeon.memory.kv import (
    BLOCK_TOKENS,
    LEAST_SLABS,
    KvPool,
    KvShape,
    blocks_for,
    choose_slab_bytes,
    cut_slabs,
)

SHAPES = (KvShape(2, 2, 16), KvShape(3, 1, 80), KvShape(1, 5, 16, torch.bfloat16))


def span(shape: KvShape, block: int) -> tuple[int, int]:
    return block * shape.page_bytes, block * shape.page_bytes + shape.block_bytes


@settings(max_examples=40)
@given(
    st.integers(60_000, 400_000),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9), st.booleans()), max_size=60),
)
def test_no_byte_is_given_twice_and_all_come_back(budget, steps):
    pool = KvPool(budget, SHAPES)
    capacity = [pool.free_blocks(shape) for shape in SHAPES]
    held: list[tuple[KvShape, list[int]]] = []
    for which, count, gives_back in steps:
        shape = SHAPES[which]
        if gives_back and held:
            pool.free(*held.pop(which % len(held)))
        elif count <= pool.free_blocks(shape):
            held.append((shape, pool.allocate(shape, count)))
        else:
            before = pool.used_bytes
            with pytest.raises(OutOfBlocks, match=f"need {count} "):
                pool.allocate(shape, count)
            assert pool.used_bytes == before
        spans = sorted(span(shape, block) for shape, blocks in held for block in blocks)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert not spans or (spans[0][0] >= 0 and spans[-1][1] <= budget)
        assert pool.used_bytes == sum(end - start for start, end in spans)
    for shape, blocks in held:
        pool.free(shape, blocks)
    assert [pool.free_blocks(shape) for shape in SHAPES] == capacity
    assert pool.used_bytes == 0


def test_a_slab_serves_another_shape_once_it_is_empty():
    pool = KvPool(100_000, SHAPES)
    blocks = pool.allocate(SHAPES[0], pool.capacity_blocks(SHAPES[0]))
    assert pool.free_blocks(SHAPES[1]) == 0
    pool.free(SHAPES[0], blocks)
    assert pool.free_blocks(SHAPES[1]) == pool.capacity_blocks(SHAPES[1]) > 0


def fill(pool: KvPool, shape: KvShape, blocks: list[int], value: float) -> None:
    for block in blocks:
        pool.pages(shape)[block : block + shape.block_pages] = value


def test_poisoned_blocks_come_back_zeroed_and_others_as_they_were():
    pool = KvPool(100_000, SHAPES)
    shape = SHAPES[0]
    kept = pool.allocate(shape, 1)
    clean, poisoned = pool.allocate(shape, 1), pool.allocate(shape, 3)
    fill(pool, shape, clean, 7.0)
    fill(pool, shape, poisoned, torch.nan)
    pool.free(shape, clean)
    pool.free(shape, poisoned, is_poisoned=True)
    pages = pool.pages(shape)
    again = pool.allocate(shape, 4)
    assert sorted(again) == sorted(clean + poisoned)
    assert all(pages[b : b + shape.block_pages].eq(7.0).all() for b in clean)
    assert not any(pages[b : b + shape.block_pages].any() for b in poisoned)
    pool.free(shape, kept + again)


def test_a_slab_is_zeroed_for_another_dtype_for_which_its_bytes_may_be_nan():
    pool = KvPool(100_000, SHAPES)
    blocks = pool.allocate(SHAPES[0], pool.capacity_blocks(SHAPES[0]))
    # Finite as float32; its lower half is a NaN as bfloat16.
    fill(pool, SHAPES[0], blocks, torch.tensor(0x3F807FC1, dtype=torch.int32).view(torch.float32))
    pool.free(SHAPES[0], blocks)
    shape = SHAPES[2]
    for block in pool.allocate(shape, pool.capacity_blocks(shape)):
        assert pool.pages(shape)[block : block + shape.block_pages].isfinite().all()


def test_freeing_twice_or_what_is_not_ours_changes_nothing():
    pool = KvPool(100_000, SHAPES)
    first, second = pool.allocate(SHAPES[0], 2)
    pool.free(SHAPES[0], [first])
    pool.free(SHAPES[0], [first])
    assert pool.used_bytes == SHAPES[0].block_bytes
    with pytest.raises(ValueError, match="no block"):
        pool.free(SHAPES[0], [second + 1])
    with pytest.raises(ValueError, match="no block"):
        pool.free(SHAPES[0], [1 << 60])


def test_a_pool_lies_where_the_caller_says():
    budget = 100_000
    memory = torch.zeros(budget, dtype=torch.uint8)
    pool = KvPool(budget, SHAPES, area=Area(memory))
    blocks = pool.allocate(SHAPES[0], 2)
    fill(pool, SHAPES[0], blocks, 1.0)
    start = blocks[1] * SHAPES[0].page_bytes
    assert memory[start : start + SHAPES[0].block_bytes].view(torch.float32).eq(1.0).all()


def test_a_closed_pool_says_so_and_its_views_stay_readable():
    pool = KvPool(100_000, SHAPES)
    pages = pool.pages(SHAPES[0])
    blocks = pool.allocate(SHAPES[0], 1)
    pool.close()
    pool.close()
    with pytest.raises(RegionError, match="closed"):
        pool.free(SHAPES[0], blocks)
    del pool
    assert not pages[blocks[0]].any()


def test_a_budget_below_one_block_is_refused():
    with pytest.raises(BudgetTooSmall, match="--kv-budget-gb"):
        KvPool(1000, SHAPES)


def test_slabs_hold_a_block_of_every_shape_and_waste_little_of_a_large_budget():
    real = (KvShape(30, 3, 64), KvShape(28, 8, 128), KvShape(24, 2, 64))
    slab = choose_slab_bytes(2 << 30, real)
    assert all(slab // shape.block_bytes >= 1 for shape in real)
    assert all(slab % shape.block_bytes < 0.15 * slab for shape in real)


def test_blocks_for_rounds_up():
    assert [blocks_for(n) for n in (0, 1, BLOCK_TOKENS, BLOCK_TOKENS + 1)] == [0, 1, 1, 2]


def test_odd_heads_make_no_slab_huge_and_their_blocks_overlap_no_others():
    shapes = (KvShape(2, 2, 67), KvShape(1, 3, 61), KvShape(3, 1, 71, torch.bfloat16))
    pool = KvPool(4 << 20, shapes)
    assert pool.slab_bytes <= 1 << 20
    held = [(shape, block) for shape in shapes for block in pool.allocate(shape, 40)]
    spans = sorted(span(shape, block) for shape, block in held)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert spans[-1][1] <= pool.slab_bytes * pool.slab_count
    for number, (shape, block) in enumerate(held):
        fill(pool, shape, [block], number)
    for number, (shape, block) in enumerate(held):
        assert pool.pages(shape)[block : block + shape.block_pages].eq(number).all()
    for shape, block in held:
        pool.free(shape, [block])
    for shape in shapes:
        everything = pool.allocate(shape, pool.capacity_blocks(shape))
        assert len(everything) > pool.slab_count
        pool.free(shape, everything)
    assert pool.used_bytes == 0


def test_an_arena_is_locked_until_it_is_closed():
    locked = {}

    class Pins:
        def pin(self, address, size_bytes, is_read_only, is_wanted):
            assert not is_read_only and is_wanted is None
            locked[address] = size_bytes
            return ""

        def unpin(self, address):
            del locked[address]

    pool = KvPool(1 << 20, SHAPES)
    assert pool.pin(Locks(Pins()))
    assert list(locked.values()) == [pool.slab_bytes * pool.slab_count]
    pool.close()
    pool.close()
    assert locked == {}


def test_slabs_hold_what_may_come_unless_few_would_be_left():
    small, large = KvShape(2, 2, 16), KvShape(24, 4, 64)
    huge = KvShape(400, 8, 128)
    budget = 128 << 20
    alone, _ = cut_slabs(budget, [small], [])
    slab_bytes, served = cut_slabs(budget, [small], [huge, large])
    assert served == [small, large] and slab_bytes % alone == 0
    assert large.block_bytes <= slab_bytes <= budget // LEAST_SLABS + alone
    assert cut_slabs(budget, [small], [large, small, huge, large]) == (slab_bytes, served)
    pool = KvPool(budget, [small], spare=[large, huge])
    assert pool.knows(large) and not pool.knows(huge)
    blocks = pool.allocate(large, 3)
    assert len(set(blocks)) == 3
    pool.free(large, blocks)
    pool.close()

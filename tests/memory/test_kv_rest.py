"""KV blocks at rest: found again, or gone to whoever needed room; never in anybody's way."""

import os
import random
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon.errors import OutOfBlocks
from aegaeon.memory.kv import KvPool, KvShape
from tests.support.regions import own_regions

SMALL, LARGE = KvShape(2, 2, 16), KvShape(3, 1, 80)
SHAPES = (SMALL, LARGE)
BUDGET = 200_000


@pytest.fixture
def path():
    with own_regions() as regions:
        yield regions.kv


def write(pool, shape, block, value):
    pool.pages(shape)[block : block + shape.block_pages] = value


def holds(pool, shape, block, value):
    return bool((pool.pages(shape)[block : block + shape.block_pages] == value).all())


def full(pool, shape=SMALL):
    """All blocks of a shape, each with its number in it."""
    blocks = pool.allocate(shape, pool.capacity_blocks(shape))
    for number, block in enumerate(blocks):
        write(pool, shape, block, number)
    return blocks


def test_what_rests_counts_as_free_and_is_found_again():
    pool = KvPool(BUDGET, SHAPES)
    blocks = full(pool)
    assert (pool.free_blocks(SMALL), pool.free_blocks(LARGE)) == (0, 0)
    words = pool.rest(SMALL, blocks)
    assert (pool.used_bytes, pool.charged_bytes) == (0, 0)
    assert pool.free_blocks(SMALL) == len(blocks)
    assert pool.free_blocks(LARGE) == pool.capacity_blocks(LARGE)
    assert pool.wake(SMALL, blocks, words) == len(blocks)
    assert pool.used_bytes == pool.charged_bytes == len(blocks) * SMALL.block_bytes
    assert all(holds(pool, SMALL, block, number) for number, block in enumerate(blocks))


def test_a_block_is_woken_once_and_only_by_the_word_of_its_last_rest():
    pool = KvPool(BUDGET, SHAPES)
    (block,) = pool.allocate(SMALL, 1)
    (first,) = pool.rest(SMALL, [block])
    assert pool.wake(SMALL, [block], [first]) == 1
    assert pool.wake(SMALL, [block], [first]) == 0
    (second,) = pool.rest(SMALL, [block])
    assert second != first and pool.wake(SMALL, [block], [first]) == 0
    assert pool.still_rest(SMALL, [block, block], [first, second]) == [False, True]
    assert pool.wake(SMALL, [block], [second]) == 1
    assert pool.wake(SMALL, [block], [pool._native.identity]) == 0


def test_free_blocks_are_taken_first_then_those_that_have_rested_longest():
    pool = KvPool(BUDGET, SHAPES)
    blocks = full(pool)
    order = random.Random(1).sample(blocks, len(blocks))
    words = dict(zip(order, pool.rest(SMALL, order), strict=True))
    pool.free(SMALL, pool.allocate(SMALL, 1))
    evicted = pool.evicted_blocks
    assert not pool.still_rest(SMALL, order[:1], [words[order[0]]])[0]
    taken = pool.allocate(SMALL, evicted)  # those that are free
    assert pool.evicted_blocks == evicted and set(taken) == set(order[:evicted])
    left = order[evicted:]
    assert all(pool.still_rest(SMALL, left, [words[block] for block in left]))


def test_a_block_that_was_woken_in_between_rests_longer():
    pool = KvPool(BUDGET, SHAPES)
    blocks = full(pool)
    words = pool.rest(SMALL, blocks)
    assert pool.wake(SMALL, blocks[:1], words[:1]) == 1
    (word,) = pool.rest(SMALL, blocks[:1])
    pool.allocate(SMALL, len(blocks) - 2)
    assert pool.wake(SMALL, blocks[:1], [word]) == 1
    assert holds(pool, SMALL, blocks[0], 0)


def test_another_shape_takes_whole_slabs_and_spares_those_with_a_block_in_use():
    pool = KvPool(BUDGET, SHAPES)
    blocks = full(pool)
    per_slab = pool.slab_blocks(SMALL)
    kept, rest = blocks[:1], blocks[1:]
    words = pool.rest(SMALL, rest)
    large = pool.allocate(LARGE, pool.capacity_blocks(LARGE) - 1)
    assert len(large) == pool.capacity_blocks(LARGE) - pool.slab_blocks(LARGE)
    assert holds(pool, SMALL, kept[0], 0)
    neighbours = per_slab - 1
    assert pool.wake(SMALL, rest[:neighbours], words[:neighbours]) == neighbours


def test_nothing_is_evicted_for_what_there_would_be_no_room_for_all_the_same():
    pool = KvPool(BUDGET, SHAPES)
    blocks = full(pool)
    words = pool.rest(SMALL, blocks[2:])
    with pytest.raises(OutOfBlocks):
        pool.allocate(SMALL, len(blocks) - 1)
    assert pool.evicted_blocks == 0
    assert pool.wake(SMALL, blocks[2:], words) == len(blocks) - 2


def test_waking_stops_at_the_quota():
    pool = KvPool(BUDGET, SHAPES, quota_bytes=4 * SMALL.block_bytes)
    blocks = pool.allocate(SMALL, 4)
    words = pool.rest(SMALL, blocks)
    held = pool.allocate(SMALL, 2)
    assert pool.wake(SMALL, blocks, words) == 2
    pool.free(SMALL, held)
    assert pool.wake(SMALL, blocks[2:], words[2:]) == 2
    assert pool.charged_bytes == pool.used_bytes == 4 * SMALL.block_bytes


def test_what_rests_is_neither_freed_nor_offered_nor_taken(path):
    pool, other = KvPool(BUDGET, SHAPES, path), KvPool(BUDGET, SHAPES, path)
    blocks = pool.allocate(SMALL, 2)
    (word,) = pool.rest(SMALL, blocks[:1])
    pool.free(SMALL, blocks[:1], is_poisoned=True)
    assert pool.offer(SMALL, blocks) is None
    assert not other.take(SMALL, blocks[:1], word)
    assert other.rest(SMALL, blocks) == [0, 0]
    assert pool.wake(SMALL, blocks[:1], [word]) == 1


def test_what_others_have_taken_does_not_rest(path):
    pool, other = KvPool(BUDGET, SHAPES, path), KvPool(BUDGET, SHAPES, path)
    blocks = pool.allocate(SMALL, 3)
    offer = pool.offer(SMALL, blocks[:2])
    assert other.take(SMALL, blocks[:1], offer)
    words = pool.rest(SMALL, blocks, offer)
    assert [word != 0 for word in words] == [False, True, False]


def test_a_client_within_its_quota_takes_the_room_of_what_rests_at_another(path):
    quota = BUDGET // 2
    pool, other = (KvPool(BUDGET, SHAPES, path, quota) for _ in range(2))
    words = {}
    for _ in range(pool.slab_count * pool.slab_blocks(SMALL)):
        blocks = pool.allocate(SMALL, 1)
        words[blocks[0]] = pool.rest(SMALL, blocks)[0]
    want = other.capacity_blocks(LARGE)
    assert other.free_blocks(LARGE) == want
    assert len(other.allocate(LARGE, want)) == want
    assert other.evicted_blocks > 0
    still = pool.still_rest(SMALL, list(words), list(words.values()))
    assert not all(still)
    woken = [b for b, w in words.items() if pool.wake(SMALL, [b], [w])]
    assert woken == [b for b, rests in zip(words, still, strict=True) if rests]


def test_what_rests_at_a_dead_client_is_free(path):
    pool = KvPool(BUDGET, SHAPES, path)
    child = os.fork()
    if not child:
        dead = KvPool(BUDGET, SHAPES, path)
        dead.rest(SMALL, dead.allocate(SMALL, dead.capacity_blocks(SMALL)))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(pool.allocate(LARGE, pool.capacity_blocks(LARGE))) == pool.capacity_blocks(LARGE)
    pool.close()


def test_a_closed_client_leaves_nothing_at_rest(path):
    pool, other = KvPool(BUDGET, SHAPES, path), KvPool(BUDGET, SHAPES, path)
    pool.rest(SMALL, pool.allocate(SMALL, 5))
    pool.close()
    blocks = other.allocate(SMALL, other.capacity_blocks(SMALL))
    assert other.evicted_blocks == 0 and len(blocks) == other.capacity_blocks(SMALL)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 32))
def test_random_traces_find_what_they_left_or_nothing(seed):
    """Against a model: a block that is woken holds what it did, nothing is held twice, and there
    is always room for what the quota allows."""
    choose = random.Random(seed)
    pool = KvPool(BUDGET, SHAPES)
    held: dict[tuple[KvShape, int], int] = {}
    resting: dict[tuple[KvShape, int, int], int] = {}
    for stamp in range(1, 200):
        match choose.choice(["allocate", "allocate", "rest", "wake", "free"]):
            case "allocate":
                shape = choose.choice(SHAPES)
                free, count = pool.free_blocks(shape), choose.randint(1, 6)
                if count > free:
                    continue
                for block in pool.allocate(shape, count):
                    assert (shape, block) not in held
                    held[shape, block] = stamp
                    write(pool, shape, block, stamp)
            case "wake" if resting:
                shape, block, word = choose.choice(list(resting))
                value = resting.pop((shape, block, word))
                if pool.wake(shape, [block], [word]):
                    assert (shape, block) not in held
                    held[shape, block] = value
            case kind if held:
                shape, block = choose.choice(list(held))
                value = held.pop((shape, block))
                assert holds(pool, shape, block, value)
                if kind == "rest":
                    resting[shape, block, pool.rest(shape, [block])[0]] = value
                else:
                    pool.free(shape, [block])
        assert pool.used_bytes == sum(shape.block_bytes for shape, _ in held)
        assert pool.charged_bytes == pool.used_bytes
    assert all(holds(pool, *place, value) for place, value in held.items())

"""What rests in a pool is told to all its clients, who find it by content, or not at all."""

import os
import random
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon.memory.kv import KvPool, KvShape
from tests.support.regions import own_regions

SMALL, LARGE = KvShape(2, 2, 16), KvShape(3, 1, 80)
SHAPES = (SMALL, LARGE)
BUDGET = 200_000


@pytest.fixture
def path():
    with own_regions() as regions:
        yield regions.kv


@pytest.fixture
def pools(path):
    """Two clients of one pool."""
    made = [KvPool(BUDGET, SHAPES, path) for _ in range(2)]
    yield made
    for pool in made:
        pool.close()


def key(number):
    return random.Random(number).randbytes(16)


def told(pool, count, first=0, shape=SMALL):
    """Lay blocks to rest that hold their numbers, and tell of them; return blocks and words."""
    blocks = pool.allocate(shape, count)
    for number, block in enumerate(blocks, first):
        pool.pages(shape)[block : block + shape.block_pages] = number
    words = pool.rest(shape, blocks)
    pool.tell(shape, [key(number) for number in range(first, first + count)], blocks, words)
    return blocks, words


def found(pool, count, first=0, shape=SMALL):
    return pool.look_up(shape, [key(number) for number in range(first, first + count)])


def test_what_one_client_tells_of_another_finds_and_wakes(pools):
    one, other = pools
    blocks, words = told(one, 3)
    assert found(other, 4) == [*zip(blocks, words, strict=True), (0, 0)]
    assert other.wake(SMALL, blocks, words) == 3
    assert (one.used_bytes, other.used_bytes) == (0, 3 * SMALL.block_bytes)
    assert one.charged_bytes == 0 and other.charged_bytes == 3 * SMALL.block_bytes
    for number, block in enumerate(blocks):
        assert (other.pages(SMALL)[block : block + SMALL.block_pages] == number).all()
    assert one.wake(SMALL, blocks, words) == 0
    assert found(one, 3) == [(0, 0)] * 3  # somebody uses them
    again = other.rest(SMALL, blocks)
    assert found(one, 3) == [(0, 0)] * 3  # nobody has told of them anew
    assert one.wake(SMALL, blocks, again) == 3


def test_a_key_means_something_with_its_shape_only(pools):
    one, other = pools
    told(one, 1)
    assert found(other, 1, shape=LARGE) == [(0, 0)]
    large = told(one, 1, shape=LARGE)
    assert found(other, 1, shape=LARGE) == [*zip(*large, strict=True)]
    assert found(other, 1)[0][1] != 0


def test_of_two_that_rest_by_one_key_the_later_stays(pools):
    one, other = pools
    first = told(one, 2)
    second = told(other, 2)
    assert found(one, 2) == [*zip(*second, strict=True)]
    assert one.still_rest(SMALL, *first) == [False, False]
    assert one.evicted_blocks == other.evicted_blocks == 0


def test_what_has_made_room_is_found_by_nobody(pools):
    one, other = pools
    told(one, 4)
    blocks = other.allocate(SMALL, other.free_blocks(SMALL))
    assert found(one, 4) == found(other, 4) == [(0, 0)] * 4
    other.free(SMALL, blocks)


def test_what_does_not_rest_is_not_told_of(pools):
    one, other = pools
    (block,) = one.allocate(SMALL, 1)
    one.tell(SMALL, [key(0)], [block], [0])
    assert found(other, 1) == [(0, 0)]


@pytest.mark.parametrize("is_closed", [False, True])
def test_what_rested_at_the_dead_is_found_by_nobody_once_it_is_reclaimed(path, is_closed):
    pool = KvPool(BUDGET, SHAPES, path)
    child = os.fork()
    if not child:
        dead = KvPool(BUDGET, SHAPES, path)
        told(dead, 5)
        if is_closed:
            dead.close()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    pool._native.reclaim()
    assert found(pool, 5) == [(0, 0)] * 5
    pool.close()


def test_what_rests_at_the_dead_may_be_woken_before_that(path):
    pool = KvPool(BUDGET, SHAPES, path)
    child = os.fork()
    if not child:
        dead = KvPool(BUDGET, SHAPES, path)
        told(dead, 5)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    blocks, words = zip(*found(pool, 5), strict=True)
    assert pool.wake(SMALL, blocks, words) == 5
    assert pool._native.reclaim() == 0
    for number, block in enumerate(blocks):
        assert (pool.pages(SMALL)[block : block + SMALL.block_pages] == number).all()
    pool.close()


def test_nearly_all_that_fits_is_found(pools):
    one, other = pools
    count = one.capacity_blocks(SMALL)
    told(one, count)
    assert sum(word != 0 for _, word in found(other, count)) > 0.9 * count


def test_what_is_told_wrongly_is_refused(pools):
    one, _ = pools
    (block,) = one.allocate(SMALL, 1)
    with pytest.raises(ValueError, match="16 bytes"):
        one.tell(SMALL, [b"short"], [block], [0])
    with pytest.raises(ValueError, match="keys"):
        one.tell(SMALL, [], [block], [0])
    with pytest.raises(ValueError, match="16 bytes"):
        one.look_up(SMALL, [b""])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 32))
def test_random_traces_of_two_clients_find_what_was_told_or_nothing(seed):
    choose = random.Random(seed)
    with own_regions() as regions:
        pools = [KvPool(BUDGET, SHAPES, regions.kv, BUDGET // 2) for _ in range(2)]
        held: list[dict[tuple[KvShape, int], int]] = [{}, {}]
        for stamp in range(1, 150):
            at = choose.randrange(2)
            pool, mine = pools[at], held[at]
            shape = choose.choice(SHAPES)
            match choose.choice(["allocate", "allocate", "rest", "wake", "free"]):
                case "allocate":
                    count = choose.randint(1, 6)
                    if count <= pool.free_blocks(shape):
                        for block in pool.allocate(shape, count):
                            assert all((shape, block) not in theirs for theirs in held)
                            mine[shape, block] = stamp
                            pool.pages(shape)[block : block + shape.block_pages] = stamp
                case "wake":
                    number = choose.randint(max(1, stamp - 40), stamp)
                    block, word = pool.look_up(shape, [key(number)])[0]
                    if word and pool.wake(shape, [block], [word]):
                        assert all((shape, block) not in theirs for theirs in held)
                        mine[shape, block] = number
                case kind if mine:
                    shape, block = choose.choice(list(mine))
                    number = mine.pop((shape, block))
                    content = pool.pages(shape)[block : block + shape.block_pages]
                    assert (content == number).all()
                    if kind == "rest":
                        words = pool.rest(shape, [block])
                        pool.tell(shape, [key(number)], [block], words)
                    else:
                        pool.free(shape, [block])
            for pool, mine in zip(pools, held, strict=True):
                assert pool.used_bytes == sum(shape.block_bytes for shape, _ in mine)
        for pool in pools:
            pool.close()

"""An offer that is let go: what was taken meanwhile, or is being taken at that moment."""

import threading

import pytest

from aegaeon.memory.kv import KvPool, KvShape
from tests.support.regions import own_regions
from tests.support.stopped import Words

SHAPE = KvShape(2, 2, 16)
SHAPES = (SHAPE, KvShape(3, 1, 80))
BUDGET = 200_000


@pytest.fixture
def path():
    with own_regions() as regions:
        yield regions.kv


def test_what_others_have_taken_is_charged_until_its_offer_is_let_go(path):
    sender, receiver = KvPool(BUDGET, SHAPES, path), KvPool(BUDGET, SHAPES, path)
    blocks = sender.allocate(SHAPE, 4)
    offer = sender.offer(SHAPE, blocks[:2])
    assert receiver.take(SHAPE, blocks[:2], offer)
    assert receiver.charged_bytes == receiver.used_bytes == 2 * SHAPE.block_bytes
    assert sender.charged_bytes >= sender.used_bytes == 2 * SHAPE.block_bytes
    sender.free(SHAPE, blocks[:2], offer=offer)
    assert sender.charged_bytes == 2 * SHAPE.block_bytes
    sender.free(SHAPE, blocks)
    assert sender.charged_bytes == 0


def take_half(path: str, offer: int, receiver: KvPool) -> tuple[Words, list[int]]:
    """Have `receiver` be in the middle of taking all that is under `offer`; where that stands."""
    words = Words(path)
    places = words.find(offer)
    for place in places:
        words[place] = receiver._native.identity | 0xFFFFFFFF << 32
    return words, places


def test_other_threads_run_while_a_sender_waits_for_a_receiver(path):
    sender, receiver = KvPool(BUDGET, SHAPES, path), KvPool(BUDGET, SHAPES, path)
    blocks = sender.allocate(SHAPE, 1)
    offer = sender.offer(SHAPE, blocks)
    words, (place,) = take_half(path, offer, receiver)
    frees = threading.Event()

    def put_back() -> None:
        frees.wait()
        words[place] = offer

    thread = threading.Thread(target=put_back)
    thread.start()
    frees.set()
    sender.free(SHAPE, blocks, offer=offer)
    assert sender.used_bytes == 0
    thread.join()


def test_a_sender_waits_once_for_a_receiver_that_stands_still(path):
    sender, receiver = KvPool(BUDGET, SHAPES, path), KvPool(BUDGET, SHAPES, path)
    blocks = sender.allocate(SHAPE, 6)
    offer = sender.offer(SHAPE, blocks)
    words, places = take_half(path, offer, receiver)
    assert len(places) == 6
    # Two seconds for all of them, not for each.
    thread = threading.Thread(target=sender.free, args=(SHAPE, blocks), kwargs={"offer": offer})
    thread.start()
    thread.join(8)
    assert not thread.is_alive()
    assert words[places[0]] != 0


def test_letting_an_offer_go_spares_a_block_that_came_back_for_something_else(path):
    sender, receiver = KvPool(BUDGET, SHAPES, path), KvPool(BUDGET, SHAPES, path)
    blocks = sender.allocate(SHAPE, 2)
    offer = sender.offer(SHAPE, blocks)
    assert receiver.take(SHAPE, blocks, offer)
    receiver.free(SHAPE, blocks)
    assert sorted(sender.allocate(SHAPE, 2)) == sorted(blocks)
    sender.free(SHAPE, blocks, offer=offer)
    assert sender.used_bytes == 2 * SHAPE.block_bytes
    sender.free(SHAPE, blocks, offer=sender.offer(SHAPE, blocks))
    assert sender.used_bytes == 0

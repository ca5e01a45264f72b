"""KV of a staged device: out at a turn's end, in at its start, and what if there is no room."""

import threading

import pytest

from aegaeon._native import CopyEngine
from aegaeon.engine.kv_swap import SwappedKv
from aegaeon.engine.sequence import Sequence
from aegaeon.engine.sequences import SequenceTable
from aegaeon.memory.costs import SwapCosts
from aegaeon.memory.kv import BLOCK_TOKENS, KvPool, blocks_for
from aegaeon.memory.traffic import Traffic
from tests.support.decoder import SHAPES, make_request
from tests.support.polling import eventually

SHAPE = SHAPES["a"]
BLOCK = SHAPE.block_bytes
# So slow that a block takes an hour: what is under way stays so.
STOPPED = BLOCK // 3600
CHUNK = BLOCK


class Swap:
    """A SwappedKv with its parts at hand."""

    def __init__(self, device_blocks=16, host_blocks=16, link_bytes_per_s=0):
        self.pool = KvPool(4 << 20, [SHAPE], quota_bytes=device_blocks * BLOCK)
        self.host = KvPool(4 << 20, [SHAPE], quota_bytes=host_blocks * BLOCK)
        self.copier = CopyEngine(1, CHUNK, link_bytes_per_s)
        self.traffic = Traffic()
        self.costs = SwapCosts(self.traffic)
        self.kv = SwappedKv((self.pool, self.host), self.copier, self.traffic, self.costs)
        self.orders = iter(range(1000))

    def sequence(self, tokens, model="a"):
        """A sequence of so many tokens, all but the last cached on the device."""
        order = next(self.orders)
        request = make_request(f"r{order}", [1] * tokens, model=model)
        sequence = Sequence(request, SHAPE, 10_000, order)
        with self.kv.lock:
            assert self.kv.grow(sequence)
        self.compute(sequence, tokens - 1)
        return sequence

    def compute(self, sequence, cached):
        """Write what depends on sequence and position, as a forward pass would."""
        for position in range(sequence.cached, cached):
            block = sequence.blocks[position // BLOCK_TOKENS]
            pages = self.pool.pages(SHAPE)[block : block + SHAPE.block_pages]
            pages[:, position % BLOCK_TOKENS] = 1000.0 * sequence.order + position
        sequence.cached = cached

    def content(self, sequence, pool=None, blocks=None):
        pool = pool or self.pool
        found = []
        for position in range(sequence.cached):
            block = (blocks or sequence.blocks)[position // BLOCK_TOKENS]
            rows = pool.pages(SHAPE)[block : block + SHAPE.block_pages, position % BLOCK_TOKENS]
            assert (rows == rows[0, 0]).all()
            found.append(float(rows[0, 0]) - 1000.0 * sequence.order)
        return found

    def host_content(self, sequence):
        return self.content(sequence, self.host, self.copy(sequence).blocks)

    def copy(self, sequence):
        return self.kv._copies[sequence.order]

    def turn(self, *own, others=()):
        with self.kv.lock:
            self.kv.begin_turn(own, others)

    def grow(self, sequence):
        with self.kv.lock:
            return self.kv.grow(sequence)

    def give_up(self, sequence):
        with self.kv.lock:
            return self.kv.give_up(sequence)

    def free(self, sequence):
        with self.kv.lock:
            self.kv.free(sequence)


@pytest.fixture
def open_swap():
    made = []

    def open_one(*args, **changes):
        made.append(Swap(*args, **changes))
        return made[-1]

    yield open_one
    for swap in made:
        swap.kv.close()


def numbers(sequence):
    return list(range(sequence.cached))


def test_at_a_turns_end_kv_goes_out_and_stays_on_the_device_while_there_is_room(open_swap):
    swap = open_swap()
    mine = swap.sequence(40)
    swap.turn(others=[mine])
    eventually(lambda: swap.kv._is_saved(mine))
    assert swap.host_content(mine) == numbers(mine)
    assert len(mine.blocks) == 3
    swap.turn(mine)
    assert swap.copy(mine).coming_in is None
    assert swap.content(mine) == numbers(mine)


def test_only_what_has_changed_goes_out_again(open_swap):
    swap = open_swap()
    mine = swap.sequence(40)
    swap.turn(others=[mine])
    first = swap.copy(mine).going_out
    assert first.wait(timeout_s=10) and first.total_bytes == 3 * BLOCK
    swap.turn(others=[mine])
    assert swap.copy(mine).going_out is first
    mine.generated = [1] * 20
    assert swap.grow(mine)
    swap.compute(mine, 55)
    swap.turn(others=[mine])
    second = swap.copy(mine).going_out
    assert second.wait(timeout_s=10) and second.total_bytes == 2 * BLOCK
    assert swap.host_content(mine) == numbers(mine)


def test_a_copy_that_is_replaced_has_ended_and_what_it_brought_is_kept(open_swap):
    swap = open_swap(link_bytes_per_s=STOPPED)
    mine = swap.sequence(40)
    swap.turn(others=[mine])
    first = swap.copy(mine).going_out
    mine.generated = [1] * 20
    assert swap.grow(mine)
    swap.compute(mine, 55)
    swap.turn(others=[mine])
    assert first.is_cancelled
    assert swap.copy(mine).going_out.total_bytes == 4 * BLOCK
    swap.free(mine)
    assert swap.copier.open_tickets == 0
    assert (swap.pool.used_bytes, swap.host.used_bytes) == (0, 0)


def test_the_device_gives_room_to_another_model_only_when_the_copy_is_out(open_swap):
    swap = open_swap(device_blocks=4, link_bytes_per_s=STOPPED)
    mine = swap.sequence(40)
    swap.turn(others=[mine])
    assert swap.pool.used_bytes == 3 * BLOCK
    wanting = Sequence(make_request("w", [1] * 40, model="b"), SHAPE, 10_000, 99)
    grown = []
    grower = threading.Thread(target=lambda: grown.append(swap.grow(wanting)))
    grower.start()
    try:
        eventually(lambda: not swap.kv.lock.locked())
        # The others are not kept waiting, and may even take away what is waited for.
        assert len(mine.blocks) == 3 and not grown
        swap.free(mine)
    finally:
        grower.join(30)
    assert grown == [True]
    assert swap.pool.used_bytes == 3 * BLOCK


def test_kv_that_had_to_leave_comes_in_at_the_next_turn(open_swap):
    swap = open_swap(device_blocks=4)
    mine = swap.sequence(40)
    swap.turn(others=[mine])
    other = swap.sequence(60)
    assert mine.blocks == [] and swap.pool.used_bytes == 4 * BLOCK
    swap.turn(mine, others=[other])
    eventually(lambda: swap.kv._is_saved(other))
    swap.turn(mine, others=[other])
    assert len(mine.blocks) == blocks_for(mine.tokens)
    assert swap.kv.await_any([mine]) == [mine]
    assert swap.content(mine) == numbers(mine)
    assert other.blocks == [] and swap.host_content(other) == numbers(other)


def test_a_step_goes_on_with_those_that_are_in(open_swap):
    swap = open_swap(device_blocks=8)
    mine, here = swap.sequence(40), swap.sequence(20)
    assert swap.give_up(mine)
    swap.kv._copier.close()
    swap.kv._copier = stopped = CopyEngine(1, CHUNK, STOPPED)
    assert swap.grow(mine)
    assert swap.kv.await_any([mine, here]) == [here]
    swap.free(mine)
    swap.kv._copier = swap.copier
    stopped.close()


def test_kv_that_is_still_coming_in_may_leave_at_once(open_swap):
    swap = open_swap()
    mine = swap.sequence(40)
    assert swap.give_up(mine)
    swap.kv._copier = stopped = CopyEngine(1, CHUNK, STOPPED)
    assert swap.grow(mine)
    coming_in = swap.copy(mine).coming_in
    assert swap.give_up(mine) and coming_in.is_cancelled
    assert swap.pool.used_bytes == 0
    stopped.close()
    swap.kv._copier = swap.copier
    assert swap.grow(mine)
    swap.kv.await_any([mine])
    assert swap.content(mine) == numbers(mine)


def test_a_release_ends_the_copies_before_the_blocks_are_free(open_swap):
    swap = open_swap(link_bytes_per_s=STOPPED)
    mine = swap.sequence(100)
    swap.turn(others=[mine])
    going_out = swap.copy(mine).going_out
    swap.free(mine)
    assert going_out.is_cancelled and swap.copier.open_tickets == 0
    assert (swap.pool.used_bytes, swap.host.used_bytes) == (0, 0)
    assert (mine.blocks, mine.cached) == ([], 0)


def test_without_room_on_the_host_kv_is_prefilled_again(open_swap):
    swap = open_swap(host_blocks=2)
    mine = swap.sequence(40)
    swap.turn(others=[mine])
    assert not swap.give_up(mine)
    assert (mine.blocks, mine.cached) == ([], 0)
    assert (swap.pool.used_bytes, swap.host.used_bytes) == (0, 0)


def test_a_sequence_that_has_computed_nothing_yet_is_not_kept(open_swap):
    swap = open_swap()
    mine = swap.sequence(40)
    mine.cached = 0
    assert not swap.give_up(mine)
    assert swap.pool.used_bytes == 0


def test_what_is_quicker_prefilled_is_not_copied_but_what_is_on_the_host_stays(open_swap):
    swap = open_swap()
    swap.traffic.add("kv_out", 1000 * BLOCK, 1000.0)
    swap.costs.note_prefill("a", tokens=100, took_s=10.0)
    short, saved = swap.sequence(40), swap.sequence(80)
    # 39 tokens take 3.9 s, three blocks out and in 6 s.
    assert not swap.give_up(short)
    # 79 tokens take 7.9 s, five blocks out and in 10 s, but in alone 5 s.
    assert not swap.kv._is_worth_keeping(saved)
    swap.turn(others=[saved])
    assert swap.copy(saved).going_out.wait(timeout_s=10)
    assert swap.give_up(saved)
    assert swap.host_content(saved) == numbers(saved)


def test_what_computes_never_leaves_though_no_turn_began(open_swap):
    swap = open_swap(device_blocks=6)
    mine, third = swap.sequence(40), swap.sequence(40)
    swap.turn(others=[mine, third])
    eventually(lambda: swap.kv._is_saved(mine) and swap.kv._is_saved(third))
    assert swap.grow(mine)
    wanting = Sequence(make_request("w", [1] * 40), SHAPE, 10_000, 99)
    assert swap.grow(wanting)
    assert len(mine.blocks) == 3 and third.blocks == []


def test_an_offer_leaves_the_device_and_is_not_brought_back(open_swap):
    swap = open_swap()
    table = SequenceTable(swap.kv)
    request = make_request("r", [1] * 40)
    with swap.kv.lock:
        sequence = table.add(request, SHAPE, 10_000)
        ready, _ = table.make_room([sequence])
    swap.compute(sequence, 39)
    assert ready == [sequence]
    with swap.kv.lock:
        handle = table.hand_over("r")
    assert handle.owner and swap.pool.used_bytes == 0
    with swap.kv.lock:
        table.begin_turn("a")
    assert swap.pool.used_bytes == 0 and not table._holders
    assert swap.host_content(sequence) == numbers(sequence)
    with swap.kv.lock:
        table.clear()
    assert swap.host.used_bytes == 0


def test_kv_that_will_never_come_in_is_forgotten_and_no_endless_wait(open_swap):
    swap = open_swap()
    mine = swap.sequence(40)
    assert swap.give_up(mine)
    swap.kv._copier = stopped = CopyEngine(1, CHUNK, STOPPED)
    assert swap.grow(mine)
    stopped.close()
    assert swap.kv.await_any([mine]) == []
    assert (mine.blocks, mine.cached) == ([], 0)  # so it is prefilled again
    assert (swap.pool.used_bytes, swap.host.used_bytes) == (0, 0)
    swap.kv._copier = swap.copier


def test_kv_that_does_not_come_in_is_forgotten_and_others_go_on(open_swap):
    swap = open_swap()
    lost, there = swap.sequence(40), swap.sequence(20)
    assert swap.give_up(lost)
    swap.kv._copier = stopped = CopyEngine(1, CHUNK, STOPPED)
    assert swap.grow(lost)
    assert swap.kv.await_any([lost, there]) == [there]
    assert lost.cached == 39  # it may still come
    stopped.close()
    assert swap.kv.await_any([lost, there]) == [there]
    assert (lost.blocks, lost.cached) == ([], 0)
    swap.kv._copier = swap.copier


def test_close_ends_copies_that_are_under_way(open_swap):
    swap = open_swap(link_bytes_per_s=STOPPED)
    mine = swap.sequence(100)
    swap.turn(others=[mine])
    swap.kv.close()
    swap.kv.close()
    assert swap.copy(mine).going_out.is_cancelled

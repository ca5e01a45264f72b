"""Requests that move more than once, or from nodes that lose sight of each other: one computes."""

import msgspec
import pytest

from aegaeon.instance import departures, ways
from aegaeon.instance.departures import GRACE_S
from aegaeon.instance.ways import OFFER_S
from aegaeon.types import Cancel
from tests.instance.test_evacuation import APART, moves, other, pair, running
from tests.support.node import assert_served, settle, until


@pytest.fixture(params=[None, APART], ids=["on a node", "apart"])
def two(request):
    """Two instances, which see the same memory or do not."""
    node = pair(request.param)
    yield node
    node.close()


def send_away(node, name):
    """Have `name` let go of model "a"; all others may have it."""
    for life in node.alive():
        leaving = {"a"} if life.name == name else set()
        life.runtime._models_leaving = lambda leaving=leaving: leaving


def test_what_comes_back_is_taken_in_again(two):
    node = two
    running(node, "r", max_tokens=600)
    for count in (1, 2, 3):
        send_away(node, node.proxy.opened["r"].target.instance)
        until(node, lambda count=count: len(moves(node)) == count)
        before = len(node.proxy.got["r"])
        node.work(20)
        assert len(node.proxy.got["r"]) > before
    assert node.proxy.failures() == []
    settle(node, 900)
    assert_served(node)


def offered(node, max_tokens=60):
    """Have a drain offer "r"; return who offers it, and to whom."""
    place = running(node, "r", max_tokens=max_tokens)
    life, there = node.lives[place], node.lives[other(node, place)]
    life.runtime.drain()
    life.turn()
    life.finish()
    life.turn()
    return life, there


def test_what_a_node_out_of_sight_may_have_is_computed_once():
    node = pair(APART)
    life, there = offered(node)
    there.turn()
    there.await_kv()  # it has all, and has not told
    life.runtime._requests.departures._table = lambda: ()
    node.now += OFFER_S + GRACE_S + 0.1
    life.turn()
    node.drop_answer(there.name, Cancel)
    assert life.scheduler.snapshot().running == {}
    life.finish()
    node.proxy.pump()
    assert [reply.code for reply in node.proxy.failures()] == ["handoff_lost"]
    settle(node, 900)
    assert_served(node)
    node.close()


def test_what_came_is_not_taken_in_long_after_its_offer():
    node = pair(APART)
    _, there = offered(node)
    there.turn()
    there.await_kv()
    there.runtime._requests.take_arrived(node.now + OFFER_S + 2 * GRACE_S)
    assert len(there.runtime._requests) == 0
    assert there.pool.owner == {}
    node.close()


def test_kv_that_does_not_belong_leaves_no_room_behind():
    node = pair(APART)
    _, there = offered(node)
    adopt = there.engine.adopt

    def refuse(request, kv, room=None):
        adopt(request, msgspec.structs.replace(kv, stream=None, blocks=()), None)

    there.engine.adopt = refuse
    settle(node, 900)
    assert_served(node)
    node.close()


def test_a_cancel_that_comes_after_the_end_goes_round_once():
    node = pair()
    home = running(node, "r", max_tokens=300)
    for count in (1, 2):
        send_away(node, node.proxy.opened["r"].target.instance)
        until(node, lambda count=count: len(moves(node)) == count)
    send_away(node, None)
    settle(node, 900)
    gone = node.lives[home].runtime._requests.departures
    seen, forward = [], gone.forward_cancel
    gone.forward_cancel = lambda cancel: (seen.append(cancel), forward(cancel))
    node.lives[home].runtime._requests.cancel(Cancel("r", 0), node.now)
    node.work(20)
    assert len(seen) <= 2


@pytest.mark.parametrize("ahead_s", [-30.0, 30.0])
def test_clocks_on_two_walls_may_differ(ahead_s, monkeypatch):
    real_s = departures.ahead_s
    monkeypatch.setattr(departures, "ahead_s", lambda: real_s() + ahead_s)
    node = pair(APART)
    _, there = offered(node)
    node.work(5)
    assert [move.instance for move in moves(node)] == [there.name]
    settle(node, 900)
    assert_served(node)
    node.close()


def test_much_kv_has_the_time_that_it_takes(monkeypatch):
    """However little of it the node's own instances were told."""
    monkeypatch.setattr(ways, "LEAST_BYTES_PER_S", 1.0)
    node = pair(APART)
    life, _ = offered(node)
    (departure,) = life.runtime._requests.departures._departures.values()
    (offer,) = life.ways.share._offers.values()
    kv_bytes = sum(map(len, offer.views))
    assert departure.kv.kv_bytes == 0 < kv_bytes
    assert departure.offer.expires_s - node.now == pytest.approx(
        min(OFFER_S + kv_bytes, ways.MAX_OFFER_S)
    )
    node.close()

"""Running requests of an instance that drains, or of a model that leaves it, go on elsewhere."""

import msgspec
import pytest

from aegaeon.instance.departures import GRACE_S
from aegaeon.instance.evacuation import AGAIN_S, MOST_AT_ONCE
from aegaeon.instance.ways import OFFER_S
from aegaeon.measures import Speed
from aegaeon.types import Accepted, Moved, Prefill, Transfer
from tests.support.node import Node, assert_empty, assert_served, settle, until

LONG = 400


APART = {"a": "one", "b": "two"}


def pair(places=None, **roles):
    node = Node(places=places, **(roles or {"a": "colocated", "b": "colocated"}))
    node.step(0.1)
    node.step(0.1)
    return node


@pytest.fixture(params=[None, APART], ids=["on a node", "apart"])
def two(request):
    """Two instances, which see the same memory or do not."""
    node = pair(request.param)
    yield node
    node.close()


def running(node, *names, model="a", max_tokens=LONG):
    """Have requests run for a while; return the name of the instance where they do."""
    for name in names:
        node.proxy.ask(name, model, max_tokens=max_tokens)
    until(node, lambda: all(len(node.proxy.got[name]) > 2 for name in names))
    (place,) = {node.proxy.opened[name].target.instance for name in names}
    return place


def other(node, place):
    (name,) = set(node.lives) - {place}
    return name


def steps_of(node, name):
    """What an instance computes from here on."""
    steps, lane = [], node.lives[name].compute
    run = lane.run
    lane.run = lambda action: (steps.append(action), run(action))[1]
    return steps


def moves(node):
    return [reply for reply in node.proxy.replies if isinstance(reply, Moved)]


def test_a_drain_moves_what_runs_and_nothing_is_computed_again(two):
    node = two
    place = running(node, "r", "s")
    steps = steps_of(node, other(node, place))
    node.lives[place].runtime.drain()
    node.work(10)
    assert node.lives[place].runtime.is_drained  # long before it would have to be
    assert sorted(move.request_id for move in moves(node)) == ["r", "s"]
    settle(node, 900)
    assert_served(node)
    assert node.proxy.failures() == []
    assert steps and not any(isinstance(step, Prefill) for step in steps)


def test_what_waits_is_sent_elsewhere_by_its_proxy(two):
    node = two
    place = running(node, "r")
    life = node.lives[place]
    life.scheduler.bound(1000, 1)  # no second one runs
    node.proxy.ask("s", max_tokens=4)
    until(node, lambda: life.scheduler.snapshot().waiting == {"a": 1})
    life.runtime.drain()
    settle(node, 900)
    assert_served(node)
    assert {reply.code for reply in node.proxy.failures()} == {"draining"}


def test_what_waits_goes_on_though_no_newcomer_would_be_let_in_there(two):
    node = two
    place = running(node, "r", max_tokens=60)
    life, there = node.lives[place], node.lives[other(node, place)]
    life.scheduler.bound(1000, 1)
    node.proxy.ask("s", max_tokens=4)
    until(node, lambda: life.scheduler.snapshot().waiting == {"a": 1})
    there.scheduler.bound(0, 1)
    life.runtime.drain()
    settle(node, 900)
    assert_served(node)


def test_an_instance_alone_ends_what_runs_as_it_drains():
    node = pair(a="colocated")
    running(node, "r", max_tokens=40)
    node.lives["a"].runtime.drain()
    settle(node)
    assert_served(node)
    assert moves(node) == [] and node.proxy.failures() == []


def test_all_that_drain_end_what_they_have(two):
    node = two
    place = running(node, "r", max_tokens=40)
    node.lives[place].runtime.drain()
    node.lives[other(node, place)].runtime.drain()  # unknown to the first, which offers it
    settle(node)
    assert_served(node)
    assert moves(node) == [] and node.proxy.failures() == []


def test_what_nobody_has_room_for_goes_on_and_is_offered_again(two):
    node = two
    place = running(node, "r")
    life, there = node.lives[place], node.lives[other(node, place)]
    there.engine.quota = 0
    life.runtime.drain()
    node.work(5)
    assert moves(node) == []
    before = len(node.proxy.got["r"])
    node.work(5)
    assert len(node.proxy.got["r"]) > before
    there.engine.quota = 1
    node.work(int(AGAIN_S / 0.03) + 5)
    assert [move.instance for move in moves(node)] == [there.name]
    settle(node, 900)
    assert_served(node)


def test_what_stays_is_not_thrown_out_where_no_more_would_be_taken_in(two):
    node = two
    place = running(node, "r", "s", "t", max_tokens=60)
    node.lives[other(node, place)].engine.quota = 0
    node.lives[place].scheduler.bound(2, 16)
    node.lives[place].runtime._drain_s = 1e3
    node.lives[place].runtime.drain()
    settle(node, 900)
    assert_served(node)
    assert moves(node) == [] and node.proxy.failures() == []


def offers_of(life):
    """Whose KV is named to others from here on."""
    offers, hand_over = [], life.engine.hand_over
    life.engine.hand_over = lambda request, *how: (
        offers.append(request),
        hand_over(request, *how),
    )[1]
    return offers


def test_what_nobody_has_room_for_stands_still_ever_more_seldom(two):
    node = two
    place = running(node, "r", max_tokens=4000)
    life = node.lives[place]
    node.lives[other(node, place)].engine.quota = 0
    offers = offers_of(life)
    life.runtime._models_leaving = lambda: {"a"}
    node.work(334)  # 10 s
    assert 2 <= len(offers) <= 6


def test_nothing_stands_still_where_all_say_that_they_have_no_room(two):
    node = two
    place = running(node, "r")
    life, there = node.lives[place], node.lives[other(node, place)]
    usage = there.engine.usage
    there.engine.usage = lambda: msgspec.structs.replace(usage(), kv_budget_bytes=0)
    node.work(10)  # it is published
    offers = offers_of(life)
    life.runtime._models_leaving = lambda: {"a"}
    node.work(40)
    assert offers == []
    there.engine.usage = usage
    settle(node, 900)
    assert_served(node)
    assert [move.instance for move in moves(node)] == [there.name]


def test_a_drain_lets_only_some_go_at_a_time(two):
    node = two
    names = [f"r{k}" for k in range(MOST_AT_ONCE + 5)]
    for life in node.alive():
        life.scheduler.bound(1000, 64)
    place = running(node, *names)
    life, open_ones = node.lives[place], []
    life.runtime.drain()
    for _ in range(40):
        node.step()
        open_ones.append(len(life.runtime._requests.departures._departures))
    assert max(open_ones) == MOST_AT_ONCE
    settle(node, 2500)
    assert_served(node)
    assert sorted(move.request_id for move in moves(node)) == sorted(names)


def test_a_model_that_leaves_takes_its_requests_with_it_and_no_others(two):
    node = two
    place = running(node, "r", "s")
    until(node, lambda: node.proxy.opened["r"].target.instance == place)
    node.proxy.ask("t", "b", max_tokens=LONG)
    until(node, lambda: len(node.proxy.got["t"]) > 2)
    node.lives[place].runtime._models_leaving = lambda: {"a"}
    node.work(10)
    assert {move.request_id for move in moves(node)} == {"r", "s"}
    settle(node, 2500)
    assert_served(node)


def test_an_offer_declined_as_the_drain_ends_is_over_and_the_proxy_knows(two):
    node = two
    place = running(node, "r")
    life, there = node.lives[place], node.lives[other(node, place)]
    there.engine.quota = 0
    life.runtime.drain()
    life.turn()
    life.finish()
    life.turn()
    for _ in range(2):
        there.turn()
        there.await_kv()
    node.now += 5.1  # the drain's time is over, and the answer not yet read
    life.turn()
    assert life.runtime.is_drained
    assert life.engine.usage().kv_bytes == 0 and life.engine.blocks == {}
    node.proxy.pump()
    assert [reply.code for reply in node.proxy.failures()] == ["draining"]


@pytest.mark.parametrize("stage", ["parted", "offered", "coming", "taken"])
@pytest.mark.parametrize("victim", ["sender", "taker"])
def test_whoever_dies_at_whatever_stage_nothing_is_lost_or_doubled(two, stage, victim):
    node = two
    place = running(node, "r", max_tokens=60)
    there = other(node, place)
    life = node.lives[place]
    life.runtime.drain()
    life.turn()
    if stage != "parted":
        life.finish()
        life.turn()
    if stage in ("coming", "taken"):
        node.lives[there].turn()
    if stage == "taken":
        node.lives[there].await_kv()
        node.lives[there].turn()
        assert node.drop_answer(place, Accepted)
    dead = place if victim == "sender" else there
    node.kill(dead)
    node.start(dead)
    settle(node, 900)
    assert_served(node)


def test_a_cancel_frees_what_is_offered(two):
    node = two
    place = running(node, "r")
    life = node.lives[place]
    life.runtime.drain()
    life.turn()
    life.finish()
    life.turn()
    node.proxy.leave("r")
    node.work(int((OFFER_S + GRACE_S) / 0.03) + 10)
    assert_empty(node)


def test_a_taker_that_never_answers_costs_a_new_attempt(two):
    node = two
    place = running(node, "r", max_tokens=60)
    there = other(node, place)
    life = node.lives[place]
    life.runtime.drain()
    for _ in range(3):
        life.turn()
        life.finish()
    assert node.drop_answer(there, Transfer)
    settle(node, 900)
    assert_served(node)
    assert [reply.code for reply in node.proxy.failures() if reply.attempt == 0] == ["handoff_lost"]


def test_where_prefilling_is_sooner_nothing_is_moved():
    node = pair(APART)
    place = running(node, "r")
    there = node.lives[other(node, place)]
    steps = steps_of(node, there.name)
    node.lives[place].ways.links.byte_s = 1e9
    rows = node.lives[place].runtime._requests.departures._table
    speed = Speed(token_s=1e-6, load_s=0.0)

    def with_speeds():
        return tuple(
            msgspec.structs.replace(
                row, status=msgspec.structs.replace(row.status, speeds={"a": speed})
            )
            for row in rows()
        )

    node.lives[place].runtime._requests.departures._table = with_speeds
    node.lives[place].runtime.drain()
    settle(node, 900)
    assert_served(node)
    assert [move.instance for move in moves(node)] == [there.name]
    assert any(isinstance(step, Prefill) for step in steps)
    assert node.proxy.failures() == []
    node.close()


def test_kv_that_breaks_off_on_its_way_is_prefilled_again_where_it_was_to_go():
    node = pair(APART)
    place = running(node, "r")
    there = node.lives[other(node, place)]
    steps = steps_of(node, there.name)
    node.lives[place].ways.share.close()
    node.lives[place].runtime.drain()
    settle(node, 900)
    assert_served(node)
    assert [move.instance for move in moves(node)] == [there.name]
    assert any(isinstance(step, Prefill) for step in steps)
    assert node.proxy.failures() == []
    node.close()


def test_what_is_prefilled_goes_to_its_own_node_first_and_else_to_another():
    places = {"p": "one", "d": "one", "e": "two"}
    node = pair(places, p="prefill", d="decode", e="decode")
    node.proxy.ask("r")
    settle(node)
    assert {move.instance for move in moves(node)} == {"d"}
    node.kill("d")
    node.proxy.ask("s")
    settle(node)
    assert_served(node)
    assert moves(node)[-1].instance == "e"
    node.close()

"""An instance tells its scheduler what of a prompt is known, at first and when that has changed."""

from aegaeon.instance.known import LOOK_S, MOST_LOOKED_AT
from aegaeon.types import Prefill
from tests.support.node import Node, assert_served, settle, until


def make_node(known):
    """A node of one instance whose engine knows so much of requests, by name; what its scheduler is
    told of them is noted."""
    node = Node(c="colocated")
    life, told = node.lives["c"], []
    life.engine.known_tokens = lambda request: known.get(request, 0)
    expect = life.scheduler.expect

    def note(request, tokens, now):
        told.append((request, tokens))
        expect(request, tokens, now)

    life.scheduler.expect = note
    node.step(1.0)
    node.step(1.0)
    return node, life, told


def send(node, life, *names):
    """Have the instance take requests in."""
    for name in names:
        node.proxy.ask(name)
    node.proxy.pump()
    life.turn()


def test_a_request_that_comes_is_looked_up():
    node, life, told = make_node({"r": 2})
    send(node, life, "r")
    assert told[0] == ("r", 2)
    settle(node)
    assert_served(node)


def test_those_that_wait_are_looked_up_again_now_and_then():
    known = {"r": 2}
    node, life, told = make_node(known)
    send(node, life, "r")  # its weights are on their way
    node.now += 1.0
    life.turn()
    told.clear()
    known.clear()
    node.now += LOOK_S / 2
    life.turn()
    assert told == []
    node.now += LOOK_S
    life.turn()
    assert told == [("r", 0)]
    settle(node)
    assert_served(node)


def test_a_prefill_that_ended_may_have_left_what_others_begin_with():
    node, life, told = make_node({})
    send(node, life, "r")
    until(node, lambda: isinstance(life.compute.action, Prefill))
    life.runtime._requests._look_at_s = node.now + 100.0
    send(node, life, "s")
    assert told.count(("s", 0)) == 2  # as it came, and behind the prefill
    settle(node)
    assert_served(node)


def test_of_many_that_wait_the_first_ones_are_looked_up():
    node, life, told = make_node({})
    names = [f"r{number}" for number in range(2 * MOST_LOOKED_AT)]
    send(node, life, *names)
    told.clear()
    node.now += 2 * LOOK_S
    life.turn()
    assert [name for name, _ in told] == names[:MOST_LOOKED_AT]
    settle(node)
    assert_served(node)

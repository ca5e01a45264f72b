"""Requests that move more than once, or from nodes that lose sight of each other: one computes."""

import pytest

from tests.instance.test_evacuation import APART, moves, pair, running
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

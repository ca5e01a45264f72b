"""Where requests go among nodes: to the least wait, seen with a few looks."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.scheduler.routing import LOOKS, Router


class FakeSite:
    def __init__(self, wait=0.0, resident=False, load=0.0):
        self.wait, self.resident, self.load = wait, resident, load
        self.looked = 0

    def wait_s(self, model):
        self.looked += 1
        return self.wait

    def is_resident(self, model):
        return self.resident


def router_of(**where):
    router = Router()
    router.settle({model: tuple(nodes) for model, nodes in where.items()})
    return router


def test_the_least_wait_wins_whoever_has_the_weights():
    sites = {"a": FakeSite(2.0, resident=True), "b": FakeSite(1.0)}
    assert router_of(m="ab").route("m", sites) == "b"


def test_of_equal_waits_the_one_with_the_weights_wins():
    sites = {"a": FakeSite(1.0, load=0.1), "b": FakeSite(1.0, resident=True, load=0.9)}
    assert router_of(m="ab").route("m", sites) == "b"
    sites["a"].resident = True
    assert router_of(m="ab").route("m", sites) == "a"


def test_only_nodes_where_the_model_lives_are_asked():
    sites = {name: FakeSite() for name in "abc"}
    assert router_of(m="c").route("m", sites) == "c"
    assert router_of(m="c").route("other", sites) is None
    assert router_of(m="cx").route("m", {"a": FakeSite()}) is None


def test_a_node_that_is_gone_gets_nothing():
    names = [f"n{i}" for i in range(40)]
    router = router_of(m=names)
    sites = {names[-1]: FakeSite()}
    assert {router.route("m", sites) for _ in range(40)} == {names[-1]}
    router.settle({"m": ()})
    assert router.route("m", sites) is None and router.nodes("m") == ()


@given(st.integers(2, 400))
def test_a_request_looks_at_few_and_all_get_their_turn(count):
    names = [f"n{i}" for i in range(count)]
    router = router_of(m=names)
    sites = {name: FakeSite(wait=1.0) for name in names}
    router.route("m", sites)
    assert sum(site.looked for site in sites.values()) <= LOOKS
    for _ in range(count):
        router.route("m", sites)
    assert all(site.looked for site in sites.values())


@pytest.mark.parametrize("count", [5, 16, 137])
def test_queues_are_nearly_as_even_as_with_a_look_at_all(count):
    """Of what a look at all nodes spares, against a draw, a few looks spare nearly everything."""
    names = tuple(f"n{i}" for i in range(count))
    means = []
    for looks in (LOOKS, count + 1):
        router = Router(looks)
        router.settle({"m": names})
        means.append(mean_queue(names, lambda sites, router=router: router.route("m", sites)))
    draw = random.Random(5)
    drawn = mean_queue(names, lambda _: draw.choice(names))
    few, every = means
    assert few < every + 0.15 * (drawn - every)


def mean_queue(names, choose):
    """Requests come at 0.9 of what all nodes serve, in steps in which each node ends one of its
    requests with 0.5."""
    draw = random.Random(4)
    sites = {name: FakeSite() for name in names}
    total, steps = 0.0, 50_000 // len(names)
    for _ in range(steps):
        for _ in names:
            if draw.random() < 0.45:
                sites[choose(sites)].wait += 1.0
        for site in sites.values():
            if site.wait and draw.random() < 0.5:
                site.wait -= 1.0
        total += sum(site.wait for site in sites.values()) / len(names)
    return total / steps


def test_settling_again_keeps_the_order_of_turns():
    names = tuple(f"n{i}" for i in range(9))
    router = router_of(m=names)
    sites = {name: FakeSite() for name in names}
    seen = Counter()
    for _ in range(90):
        chosen = router.route("m", sites)
        sites[chosen].wait += 1.0
        seen[chosen] += 1
        router.settle({"m": names})
    assert max(seen.values()) - min(seen.values()) <= 2

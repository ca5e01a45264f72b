"""Where models of a cluster are chosen to live, without any node."""

from collections import Counter

import pytest

from aegaeon.cluster.homes import abode_of, choose
from aegaeon.placements import Abode
from aegaeon.scheduler.levels import Node
from aegaeon.scheduler.placement import Need, Rules

BY_LOAD = Rules(least=1)
AUTO = Rules(least=0)


def make_node(name, cache=1000, device=1 << 60, labels=()):
    return Node(
        id=name, devices=1, cache_bytes=cache, device_bytes=device, link_bytes_per_s=1e9,
        wire_bytes_per_s=1e9, labels=frozenset(labels),
    )  # fmt: skip


def make_needs(count, weight=100, busy=0.01):
    return [Need(model=f"m{i}", weight_bytes=weight, busy=busy) for i in range(count)]


def test_a_cluster_whose_nodes_hold_all_has_everything_everywhere():
    nodes = [make_node("a"), make_node("b", cache=300)]
    homes = choose(nodes, make_needs(3), {}, AUTO)
    assert homes.rule == "everywhere"
    assert homes.where == {f"m{i}": ("a", "b") for i in range(3)}
    assert set(homes.why.values()) == {"everywhere"}
    assert homes.levels == pytest.approx({"a": 0.015, "b": 0.015})
    # One node has no room for a fourth: then they are placed, and once is enough for each.
    homes = choose(nodes, make_needs(4), {}, AUTO)
    assert homes.rule == "load"
    assert all(len(where) == 1 for where in homes.where.values())


def test_models_nobody_has_asked_for_are_spread_evenly():
    homes = choose([make_node(name) for name in "abc"], make_needs(9), {}, BY_LOAD)
    assert Counter(node for where in homes.where.values() for node in where) == Counter("abc" * 3)
    assert set(homes.why.values()) == {"new"}


def test_no_model_is_left_out_where_caches_are_too_small_for_all():
    nodes = [make_node("a", cache=250), make_node("b", cache=500)]
    needs = make_needs(30)
    homes = choose(nodes, needs, {}, BY_LOAD)
    counts = Counter(where[0] for where in homes.where.values())
    assert sum(counts.values()) == 30 and 0.3 < counts["a"] / counts["b"] < 0.7
    # And it stays as it is: who was placed beyond the caches is not thrown out again.
    again = choose(nodes, needs, homes.where, BY_LOAD)
    assert again.where == homes.where and again.why == {}


def test_a_model_lives_where_its_labels_are_or_nowhere():
    nodes = [make_node("a"), make_node("b", labels=["pool=x"])]
    needs = [
        Need(model="x", weight_bytes=1, labels=frozenset(["pool=x"])),
        Need(model="y", weight_bytes=1, labels=frozenset(["pool=y"])),
    ]
    for rules in (AUTO, BY_LOAD):
        homes = choose(nodes, needs, {}, rules)
        assert homes.where == {"x": ("b",), "y": ()}
        assert homes.why["y"] == "no_labels"


def test_one_that_no_device_holds_is_left_to_instances_to_refuse():
    homes = choose([make_node("a", device=10), make_node("b", device=20)], make_needs(1), {}, AUTO)
    assert homes.where["m0"] == ("a", "b")
    homes = choose([make_node("a", device=10, cache=5)], make_needs(1), {}, AUTO)
    assert homes.where["m0"] == ("a",) and homes.why["m0"] == "too_large"


def test_a_model_has_the_replicas_that_it_asks_for():
    nodes = [make_node(name) for name in "abc"]
    needs = [Need(model="m", weight_bytes=1, least=2), Need(model="n", weight_bytes=1)]
    homes = choose(nodes, needs, {}, BY_LOAD)
    assert {model: len(where) for model, where in homes.where.items()} == {"m": 2, "n": 1}


def test_who_is_not_chosen_any_more_leaves_while_it_lives():
    homes = choose([make_node(name) for name in "bc"], make_needs(1), {"m0": ("c",)}, BY_LOAD)
    before = Abode(("a", "b", "d"), ("c",), "busier")
    after = abode_of("m0", homes, before, {"a", "b", "c"})
    assert after == Abode(("c",), ("a", "b"), "busier")
    assert abode_of("m0", homes, after, {"a", "b", "c"}) is after
    assert abode_of("m0", homes, None, {"c"}) == Abode(("c",), (), "new")


@pytest.mark.parametrize("rules", [BY_LOAD, AUTO])
def test_what_all_refuse_stays_where_it_is_and_says_so(rules):
    nodes = [make_node(name) for name in "abc"]
    need = Need(model="m", weight_bytes=100, barred=frozenset("abc"))
    homes = choose(nodes, [need], {"m": ("b",)}, rules)
    assert (homes.where, homes.why) == ({"m": ("b",)}, {"m": "refused_by_all"})
    homes = choose(nodes, [need], {}, rules)
    assert homes.where == {"m": ("a",)}  # one that says why
    was = Abode(("b",))
    abode = abode_of("m", choose(nodes, [need], {"m": ("b",)}, rules), was, "abc")
    assert abode == Abode(("b",), (), "refused_by_all")
    taken = Need(model="m", weight_bytes=100)
    abode = abode_of("m", choose(nodes, [taken], {"m": ("b",)}, BY_LOAD), abode, "abc")
    assert abode == Abode(("b",), (), "new")

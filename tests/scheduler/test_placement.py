"""Where models live: nothing over its bounds, nobody moved without need, nodes evenly busy."""

from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.scheduler.levels import Node
from aegaeon.scheduler.placement import Need, Rules, place

GB = 10**9
CALM = Rules(full=1e9, easy=1e9)  # nobody is ever crowded, one replica is always enough


def node(name, devices=8, cache_gb=1000, labels=(), device_gb=72):
    return Node(
        id=name,
        devices=devices,
        cache_bytes=cache_gb * GB,
        device_bytes=device_gb * GB,
        link_bytes_per_s=16e9,
        wire_bytes_per_s=10e9,
        labels=frozenset(labels),
    )


def need(name, busy=0.1, gb=14, labels=(), loads_per_s=0.0):
    return Need(
        model=name,
        weight_bytes=gb * GB,
        busy=busy,
        loads_per_s=loads_per_s,
        labels=frozenset(labels),
    )


def nodes_of(count, **kwargs):
    return [node(f"n{index:03d}", **kwargs) for index in range(count)]


def where_moved(placed):
    return Counter((move.model, move.to) for move in placed.moves)


some_nodes = st.lists(
    st.builds(
        lambda devices, cache, labels: (devices, cache, labels),
        st.sampled_from([1, 2, 8]),
        st.integers(10, 120),
        st.sampled_from([(), ("a",), ("a", "b")]),
    ),
    min_size=1,
    max_size=8,
).map(lambda rows: [node(f"n{i}", *row) for i, row in enumerate(rows)])
some_needs = st.lists(
    st.tuples(
        st.floats(0.0, 12.0),
        st.integers(5, 80),
        st.sampled_from([(), (), ("a",), ("b",)]),
        st.sampled_from([0.0, 0.0, 0.1, 2.0]),
    ),
    max_size=14,
).map(lambda rows: [need(f"m{i}", *row) for i, row in enumerate(rows)])


def check(nodes, needs, placed):
    by_id = {one.id: one for one in nodes}
    held = Counter()
    assert list(placed.where) == [one.model for one in needs]
    for one in needs:
        where = placed.where[one.model]
        assert len(set(where)) == len(where)
        for name in where:
            held[name] += one.weight_bytes
            assert one.labels <= by_id[name].labels
            assert one.weight_bytes <= by_id[name].device_bytes
    for one in nodes:
        assert held[one.id] <= one.cache_bytes
    spare = Counter()
    for one in needs:
        for name in placed.where[one.model] if len(placed.where[one.model]) > 1 else ():
            spare[name] += one.weight_bytes
    for one in needs:
        assert (not placed.where[one.model]) == (one.model in placed.left)
        for other in nodes if one.model in placed.left else ():
            is_able = one.labels <= other.labels and one.weight_bytes <= other.device_bytes
            room = other.cache_bytes - held[other.id] + spare[other.id]
            assert not is_able or room < one.weight_bytes


@given(some_nodes, some_needs)
def test_nothing_is_over_its_bounds_and_what_fits_lives_somewhere(nodes, needs):
    placed = place(nodes, needs, {})
    check(nodes, needs, placed)
    assert not placed.drops
    assert where_moved(placed) == Counter(
        (m, n) for m, where in placed.where.items() for n in where
    )


@given(some_nodes, some_needs, some_nodes, some_needs)
def test_moves_and_drops_lead_from_what_was_to_what_is(nodes, needs, later_nodes, later_needs):
    before = place(nodes, needs, {}).where
    placed = place(later_nodes, later_needs, before)
    check(later_nodes, later_needs, placed)
    alive = {one.id for one in later_nodes}
    was = Counter((m, n) for m, where in before.items() for n in where if n in alive)
    dropped = Counter((drop.model, drop.node) for drop in placed.drops if drop.node in alive)
    now = Counter((m, n) for m, where in placed.where.items() for n in where)
    assert was - dropped + where_moved(placed) == now
    for move in placed.moves:
        assert move.source is None or move.source in before[move.model]
        assert move.leaves is None or move.leaves == move.source
    assert placed == place(later_nodes, later_needs, before)


@given(some_nodes, some_needs)
def test_a_placement_settles(nodes, needs):
    where, rounds = {}, 0
    while True:
        placed = place(nodes, needs, where)
        if not placed.moves and not placed.drops:
            break
        where, rounds = placed.where, rounds + 1
        assert rounds < 12


@given(some_nodes, some_needs, st.data())
def test_a_lost_node_moves_its_own_models_only(nodes, needs, data):
    before = place(nodes, needs, {}, CALM).where
    lost = data.draw(st.sampled_from(nodes)).id
    placed = place([one for one in nodes if one.id != lost], needs, before, CALM)
    orphans = {model for model, where in before.items() if lost in where}
    for move in placed.moves:
        assert move.model in orphans | {m for m, where in before.items() if not where}
        assert move.why == ("lost" if move.model in orphans else "new")
    assert not placed.drops
    for model, where in before.items():
        assert set(where) - {lost} <= set(placed.where[model])


@given(st.integers(1, 9), st.lists(st.floats(0.0, 3.0), min_size=1, max_size=30))
def test_nodes_are_as_evenly_busy_as_the_largest_model_allows(count, busy):
    """Graham's bound for lists: the mean and one job more."""
    nodes = nodes_of(count, cache_gb=10**6)
    placed = place(nodes, [need(f"m{i}", one) for i, one in enumerate(busy)], {}, CALM)
    mean = sum(busy) / count
    assert 8 * max(placed.levels.values()) <= mean + max(busy) * (1 - 1 / count) + 1e-9


@given(st.lists(st.floats(0.0, 40.0), min_size=1, max_size=12))
def test_more_load_never_gets_fewer_replicas(loads):
    nodes, where, last = nodes_of(10), {}, 0
    for busy in sorted(loads):
        where = place(nodes, [need("m", busy)], where).where
        assert len(where["m"]) >= last
        last = len(where["m"])
        assert last == 10 or busy <= 0.75 * 8 * last + 1e-6


def test_a_replica_goes_only_when_the_rest_have_time_to_spare():
    nodes = nodes_of(4)
    two = place(nodes, [need("m", 5.0)], {}).where
    assert len(two["m"]) == 2
    assert place(nodes, [need("m", 2.6)], two).where == two
    less = place(nodes, [need("m", 2.1)], two)
    assert len(less.where["m"]) == 1
    assert [(drop.model, drop.why) for drop in less.drops] == [("m", "idle")]


def test_a_busy_model_spreads_while_nodes_have_time():
    assert len(place(nodes_of(40), [need("m", 16.0)], {}).where["m"]) == 5
    rest = [need(f"r{i}", 1.0) for i in range(170)]
    assert len(place(nodes_of(40), [need("m", 16.0), *rest], {}).where["m"]) == 3


def test_a_crowded_node_is_relieved_and_says_so():
    nodes = nodes_of(2)
    before = {"a": ("n000",), "b": ("n000",), "c": ("n001",)}
    placed = place(nodes, [need("a", 4.0), need("b", 3.5), need("c", 0.5)], before)
    (move,) = placed.moves
    assert (move.model, move.to, move.why) == ("b", "n001", "crowded")
    assert move.source == move.leaves == "n000"
    assert [(drop.model, drop.node, drop.why) for drop in placed.drops] == [("b", "n000", "moved")]


def test_a_node_that_is_not_crowded_keeps_its_models_however_idle_another_is():
    before = {"a": ("n000",), "b": ("n000",)}
    placed = place(nodes_of(2), [need("a", 3.0), need("b", 2.0)], before)
    assert placed.where == before and not placed.moves


def test_no_more_move_at_once_than_is_allowed():
    needs = [need(f"m{i}", 0.5) for i in range(40)]
    before = {one.model: ("n000",) for one in needs}
    placed = place(nodes_of(4), needs, before, Rules(most_moves=3))
    assert len(placed.moves) == 3


def test_weights_come_from_whoever_has_them_in_turn():
    nodes, where = nodes_of(6), {"a": ("n000", "n001"), "b": ("n000",)}
    placed = place(nodes, [need("a", 20.0), need("b", 0.1)], where)
    assert Counter(move.source for move in placed.moves) == {"n000": 1, "n001": 1}


def test_a_new_model_takes_the_room_of_one_that_lives_elsewhere_too():
    nodes = nodes_of(2, cache_gb=30)
    before = {"a": ("n000", "n001"), "b": ("n000",)}
    needs = [need("a", 9.0), need("b", 0.1), need("c", 0.1, gb=20)]
    placed = place(nodes, needs, before)
    assert placed.where == {"a": ("n000",), "b": ("n000",), "c": ("n001",)}
    assert [(drop.model, drop.node, drop.why) for drop in placed.drops] == [("a", "n001", "room")]
    assert placed.short == ("a",) and not placed.left


def test_a_node_with_less_room_than_before_gives_up_what_is_least_busy():
    before = {"a": ("n000",), "b": ("n000",), "c": ("n000",)}
    needs = [need("a", 2.0), need("b", 0.5), need("c", 1.0)]
    placed = place([node("n000", cache_gb=30), node("n001", cache_gb=10)], needs, before)
    assert placed.left == ("b",) and placed.where["a"] == placed.where["c"] == ("n000",)


def test_links_count_as_devices_do():
    """Weights that come often keep a link busy, however little is computed."""
    needs = [need(f"m{i}", 0.01, gb=16, loads_per_s=3.0) for i in range(4)]
    placed = place(nodes_of(2), needs, {})
    assert sorted(Counter(where[0] for where in placed.where.values()).values()) == [2, 2]
    assert max(placed.levels.values()) == pytest.approx(6 / 8)


def test_small_nodes_get_small_shares():
    nodes = [node("big", devices=8), node("small", devices=1)]
    needs = [need(f"m{i}", 0.25) for i in range(18)]
    placed = place(nodes, needs, {})
    held = Counter(where[0] for where in placed.where.values())
    assert (held["big"], held["small"]) == (16, 2)


def test_without_nodes_every_model_is_left():
    assert place([], [need("a")], {}).left == ("a",)
    assert place(nodes_of(1), [], {"a": ("n000",)}).drops[0].why == "unwanted"


def test_two_replicas_are_never_both_on_the_only_node():
    placed = place(nodes_of(1), [need("a", 30.0)], {}, msgspec.structs.replace(Rules(), least=3))
    assert placed.where == {"a": ("n000",)} and not placed.short


def test_a_node_that_refuses_a_model_is_no_home_for_it():
    model = msgspec.structs.replace(need("m"), barred=frozenset(["n000", "elsewhere"]))
    placed = place(nodes_of(3), [model, need("other")], {"m": ("n000",), "other": ("n001",)})
    assert placed.where == {"m": ("n002",), "other": ("n001",)}
    (move,) = placed.moves
    assert (move.model, move.to, move.why) == ("m", "n002", "refused")
    assert [(drop.model, drop.node) for drop in placed.drops] == [("m", "n000")]
    # No more replicas than nodes that take it, and none where there is none.
    many = msgspec.structs.replace(model, least=3)
    assert place(nodes_of(3), [many], {}).short == ()
    assert place(nodes_of(1), [model], {}).left == ("m",)


def test_no_room_is_made_where_a_model_is_refused():
    nodes = nodes_of(2, cache_gb=14)
    model = msgspec.structs.replace(need("m"), barred=frozenset(["n000"]))
    placed = place(nodes, [model, need("a")], {"a": ("n000", "n001")}, Rules(least=2))
    assert placed.where == {"m": ("n001",), "a": ("n000",)}


@given(some_nodes, some_needs, st.data())
def test_nobody_lives_where_it_is_refused(nodes, needs, data):
    names = st.frozensets(st.sampled_from([one.id for one in nodes]))
    before = place(nodes, needs, {}).where
    needs = [msgspec.structs.replace(one, barred=data.draw(names)) for one in needs]
    placed = place(nodes, needs, before)
    for one in needs:
        assert not one.barred.intersection(placed.where[one.model])
    assert place(nodes, needs, placed.where).where.keys() == placed.where.keys()

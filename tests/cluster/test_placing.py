"""A placement kept over time: nodes and models that come and go, over rows that tests write."""

import msgspec

from aegaeon.cluster.placing import HOLD_S, LEAVE_S, Placing, Seen
from aegaeon.cluster.plan import MemberPlan
from aegaeon.nodes import MemberNow, NodeNow
from aegaeon.placements import Abode, Placement
from aegaeon.types import InstanceStatus
from tests.support.placed import EPOCH_S, Town, make_row
from tests.support.specs import make_spec


def test_models_are_spread_before_any_instance_lives_and_then_stay():
    town = Town("abcdef")
    town.down = set("abc")
    assert town.turn()
    assert sorted(nodes[0] for nodes in town.where().values()) == list("aabbcc")
    town.down = set()
    for _ in range(300):
        assert not town.turn()
    assert town.unserved() == set()


def test_a_controller_that_begins_again_leaves_all_as_it_is():
    town = Town("abcdef")
    town.settle()
    town.come({"a": 20.0}, 300)
    town.turn(EPOCH_S)
    town.settle()
    assert len(town.where()["a"]) > 1
    town.placing = Placing(town.settings)
    for _ in range(10):
        assert not town.turn()


def test_where_the_store_has_forgotten_it_models_stay_where_they_are_served():
    town = Town("abcdef")
    town.settle()
    before = town.where()
    town.placing = Placing(town.settings)
    town.catalog = msgspec.structs.replace(town.catalog, placement=None)
    serves = {node: set(models) for node, models in town.serves.items()}
    town.turn()
    assert town.where() == before and town.serves == serves


def test_where_all_is_forgotten_rows_are_waited_for():
    town = Town("abcdef")
    town.settle()
    town.come({"a": 20.0}, 300)
    town.turn(EPOCH_S)
    town.settle()
    before = town.where()
    town.placing = Placing(town.settings, town.now + 10.0)
    town.catalog = msgspec.structs.replace(town.catalog, placement=None)
    town.down = set("bc")
    placement = town.placing.look(town.catalog, town.seen(), town.now + 1)
    assert placement is None
    town.down = set()
    placement = town.placing.look(town.catalog, town.seen(), town.now + 2)
    assert {model: abode.nodes for model, abode in placement.abodes.items()} == before
    # But not for ever.
    town.placing = Placing(town.settings, town.now + 10.0)
    town.down = set("bc")
    placement = town.placing.look(town.catalog, town.seen(), town.now + 10)
    assert all(abode.nodes for abode in placement.abodes.values())


def test_a_catalogue_behind_what_instances_have_seen_is_published_again():
    town = Town("ab")
    town.settle()
    seen = town.seen()
    rows = tuple(
        msgspec.structs.replace(row, status=InstanceStatus(state="ready", catalog=99))
        for row in seen.rows
    )
    placement = town.placing.look(town.catalog, msgspec.structs.replace(seen, rows=rows), town.now)
    assert placement == town.catalog.placement
    assert town.placing.look(town.catalog, seen, town.now) is None


def test_a_lost_nodes_models_are_placed_at_once_and_the_others_stay():
    town = Town("abcdef")
    town.settle()
    before = town.where()
    lost = before["a"][0]
    town.down, town.silent = {lost}, {lost}
    assert town.turn()
    for model, nodes in town.where().items():
        if before[model] == (lost,):
            assert lost not in nodes and nodes
            assert town.catalog.placement.abodes[model].why == "lost"
        else:
            assert nodes == before[model]
    town.turn()
    assert town.unserved() == set()
    # It comes back, empty: nothing is thrown about for its sake.
    town.down, town.silent = set(), set()
    where = town.where()
    town.settle()
    assert town.where() == where


def test_a_restarted_instance_loses_nothing():
    town = Town("abcdef")
    town.settle()
    town.down = {"a"}  # its supervisor answers
    for _ in range(20):
        assert not town.turn()


def test_a_node_that_cannot_start_gets_nothing_and_its_models_go_elsewhere():
    town = Town("abcdef")
    town.down = set("abc")
    town.turn()
    town.down = {"a"}
    failed = MemberNow(name="instance-a", kind="instance", node="a", state="failed")
    seen = town.seen()
    seen = msgspec.structs.replace(seen, failed=frozenset([failed.node]))
    placement = town.placing.look(town.catalog, seen, town.now + 1)
    assert all("a" not in abode.nodes for abode in placement.abodes.values())
    assert all(abode.nodes for abode in placement.abodes.values())


def test_a_model_leaves_only_when_others_serve_it():
    town = Town("m", nodes="ab")
    town.settle()
    (home,) = town.where()["m"]
    (other,) = set("ab") - {home}
    town.slow = {other}
    town.nodes.pop(home)  # drained: its instances are not planned any more, and serve on
    town.nodes = {other: 1}
    nodes = [NodeNow(id=n, address="") for n in "ab"]
    plans = [MemberPlan(name="i", kind="instance", node=other, settings=town.settings)]
    rows = (make_row(home, "m"), make_row(other, ()))
    seen = Seen.of(nodes, plans, rows, (), ())
    placement = town.placing.look(town.catalog, seen, town.now + 1)
    assert placement.abodes["m"].nodes == (other,)
    assert placement.abodes["m"].leaving == (home,)
    catalog = msgspec.structs.replace(town.catalog, placement=placement)
    assert placement.is_home("m", home, is_open=False)
    assert town.placing.look(catalog, seen, town.now + 2) is None
    rows = (make_row(home, "m"), make_row(other, "m"))
    seen = Seen.of(nodes, plans, rows, (), ())
    placement = town.placing.look(catalog, seen, town.now + 3)
    assert placement.abodes["m"].leaving == ()


def test_a_busy_model_gets_more_nodes_and_keeps_them_while_it_is_busy():
    town = Town("abcdef")
    town.settle()
    town.come({"a": 20.0}, 300)
    assert town.turn(EPOCH_S)
    abode = town.catalog.placement.abodes["a"]
    assert len(abode.nodes) > 1 and abode.why == "busier"
    town.settle()
    for _ in range(5):
        town.come({"a": 20.0}, EPOCH_S)
        town.turn()
        assert town.catalog.placement.abodes["a"].nodes == abode.nodes
    town.come({}, 1200)
    town.turn(EPOCH_S)
    town.settle()
    assert len(town.where()["a"]) == 1
    assert town.unserved() == set()


def test_load_that_shifts_moves_models_and_none_is_ever_unserved():
    town = Town("abcdefghi", most_moves=2)
    town.settle()
    before = town.where()
    crowded = [model for model, nodes in before.items() if nodes == ("a",)]
    assert len(crowded) == 3
    moved = 0
    for _ in range(8):
        town.come(dict.fromkeys(crowded, 2.0), EPOCH_S)
        town.slow = set("abc")  # weights take their time
        town.turn()
        assert town.unserved() == set()
        after = town.where()
        changed = [m for m in after if after[m] != before[m]]
        moved = max(moved, len(changed))
        town.slow = set()
        town.settle(2)
        assert town.unserved() == set()
        before = after
    homes = {node for model in crowded for node in town.where()[model]}
    assert len(homes) > 1
    assert 0 < moved <= 3


def test_one_node_that_never_serves_does_not_keep_a_model_where_it_is_to_leave():
    town = Town("abcdef")
    town.settle()
    town.come({"a": 20.0}, 300)
    (home,) = town.where()["a"]
    town.turn(EPOCH_S)
    nodes = town.where()["a"]
    assert len(nodes) > 1
    slow = next(node for node in nodes if node != home)
    town.slow = {slow}
    town.serves[slow].discard("a")
    abodes = town.catalog.placement.abodes
    leaving = tuple(set("abc") - set(nodes)) or (home,)
    abode = msgspec.structs.replace(
        abodes["a"], nodes=tuple(n for n in nodes if n not in leaving), leaving=leaving
    )
    placement = msgspec.structs.replace(town.catalog.placement, abodes={**abodes, "a": abode})
    town.catalog = msgspec.structs.replace(town.catalog, placement=placement)
    town.placing._every_s = 0.0
    if len(abode.nodes) > 1:
        assert not town.turn()
        assert town.turn(LEAVE_S)
        assert town.catalog.placement.abodes["a"].leaving == ()


def test_a_model_that_comes_is_placed_and_one_that_goes_is_forgotten():
    town = Town("ab")
    town.settle()
    models = (*town.catalog.models, make_spec("new"))
    town.catalog = msgspec.structs.replace(town.catalog, models=models)
    assert town.turn()
    assert len(town.where()["new"]) == 1
    models = tuple(spec for spec in town.catalog.models if spec.id != "a")
    town.catalog = msgspec.structs.replace(town.catalog, models=models)
    assert town.turn()
    assert set(town.where()) == {"b", "new"}


def test_a_node_that_joins_gets_models_when_it_serves():
    town = Town("abcdef", nodes="a", replicas=0)
    town.settle()
    assert town.catalog.placement.rule == "everywhere"
    town.nodes["b"], town.serves["b"] = 1, set()
    town.down = {"b"}
    assert not town.turn()
    town.down = set()
    assert town.turn()
    assert set(town.where().values()) == {("a", "b")}
    town.settle()
    assert town.serves["b"] == set("abcdef")


def test_without_any_node_nothing_changes():
    town = Town("abc", nodes="")
    assert not town.turn()


def test_a_drained_nodes_instances_go_on_until_its_models_are_served_elsewhere():
    town = Town("m", nodes="ab")
    town.settle()
    (home,) = town.where()["m"]
    nodes = [NodeNow(id=n, address="", is_draining=n == home) for n in "ab"]
    assert town.placing.held(town.catalog, nodes, town.now) == [n for n in nodes if n.id == home]
    assert town.placing.held(town.catalog, nodes, town.now + HOLD_S) == []  # but not for ever
    abodes = {"m": Abode(("x",), (home,))}
    catalog = msgspec.structs.replace(town.catalog, placement=Placement(abodes=abodes))
    assert len(town.placing.held(catalog, nodes, town.now + 1)) == 1
    catalog = msgspec.structs.replace(catalog, placement=Placement(abodes={"m": Abode(("x",))}))
    assert town.placing.held(catalog, nodes, town.now + 1) == []

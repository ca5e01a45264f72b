"""Models that nodes refuse: others have them, and where all do it is said."""

import msgspec

from aegaeon.cluster.refusals import Refusals
from aegaeon.specs import Catalog
from tests.support.placed import EPOCH_S, Town, make_row
from tests.support.specs import make_spec


def test_a_model_that_its_home_refuses_goes_elsewhere_and_does_not_come_back():
    town = Town("abcdef")
    town.turn()
    before = town.where()
    (home,) = before["a"]
    town.refuses = {home: {"a"}}
    town.turn()
    town.settle()
    (other,) = town.where().pop("a")
    assert other != home and town.unserved() == set()
    abode = town.catalog.placement.abodes["a"]
    assert (abode.leaving, abode.why) == ((), "refused")
    assert {m: n for m, n in town.where().items() if m != "a"} == {
        m: n for m, n in before.items() if m != "a"
    }
    for _ in range(50):  # it asks for nothing there, which refuses nothing any more
        assert not town.turn(EPOCH_S / 4)
    # The next one refuses it, too: the third has it, not the first.
    town.refuses[other] = {"a"}
    town.settle()
    assert set(town.where()["a"]) == set("abc") - {home, other}
    assert town.unserved() == set()


def test_a_model_that_all_refuse_is_left_and_says_so_until_something_changes():
    town = Town("ab", nodes="xyz")
    town.refuses = {node: {"a"} for node in "xyz"}
    town.settle(10)
    abode = town.catalog.placement.abodes["a"]
    assert len(abode.nodes) == 1 and abode.leaving == () and abode.why == "refused_by_all"
    assert town.refused(abode.nodes[0]) == {"a": "no budget"}  # why, for who looks
    for _ in range(20):
        assert not town.turn(EPOCH_S / 4)
    # A node that comes is tried.
    town.nodes["w"], town.serves["w"] = 1, set()
    town.settle()
    assert town.where()["a"] == ("w",) and town.serves["w"] >= {"a"}
    assert town.unserved() == set()


def test_a_model_whose_spec_changes_is_tried_again_where_it_was_refused():
    town = Town("a", nodes="xy")
    town.refuses = {node: {"a"} for node in "xy"}
    town.settle(10)
    assert town.catalog.placement.abodes["a"].why == "refused_by_all"
    town.refuses = {}
    spec = make_spec("a", 50)
    town.catalog = msgspec.structs.replace(town.catalog, models=(spec,), version=99)
    town.settle()
    assert town.catalog.placement.abodes["a"].why == "new"
    assert town.unserved() == set()


def test_a_change_that_all_refuse_takes_nobody_what_is_served():
    town = Town("a", nodes="xy")
    town.settle()
    (home,) = town.where()["a"]
    spec = make_spec("a", 150)
    models = {"models": (spec,), "version": 99}
    town.catalog = msgspec.structs.replace(town.catalog, **models)
    for _ in range(10):
        placement = town.placing.look(town.catalog, town.seen(), town.now)
        if placement is not None:
            version = town.catalog.version + 1
            town.catalog = msgspec.structs.replace(
                town.catalog, placement=placement, version=version
            )
        town.refuses = {node: {"a"} for node in "xy"}
        town.wanted.update({node: {s.id for s in town.catalog.on(node)} for node in "xy"})
        town.followed = town.catalog.version
    abode = town.catalog.placement.abodes["a"]
    assert home in abode.nodes + abode.leaving and town.serves[home] == {"a"}
    assert abode.why == "refused_by_all"


def test_where_everything_lives_everywhere_who_refuses_is_left_out():
    town = Town("ab", nodes="xyz", replicas=0)
    town.refuses = {"y": {"a"}}
    town.settle()
    assert town.catalog.placement.rule == "everywhere"
    assert town.where() == {"a": ("x", "z"), "b": ("x", "y", "z")}


def test_refusals_are_of_what_is_wanted_now_by_all_of_a_node_and_while_it_lives():
    refusals = Refusals()
    catalog = Catalog(version=5, models=(make_spec("m"),))
    no = {"m": "no budget"}

    def barred(*rows, alive="xy"):
        refusals.note(catalog, rows, alive)
        return refusals.barred

    assert barred(make_row("x", (), catalog=4, refused=no)) == {}  # of what was wanted before
    assert barred(make_row("x", (), state="draining", catalog=5, refused=no)) == {}
    both = make_row("x", (), catalog=5, refused=no), make_row("x", "m", catalog=5)
    assert barred(*both) == {}
    assert barred(make_row("x", (), catalog=5, refused=no)) == {"m": {"x"}}
    assert barred(make_row("x", (), catalog=6)) == {"m": {"x"}}
    assert barred(alive="y") == {}
    assert barred(make_row("x", (), catalog=6)) == {}
    assert barred(make_row("x", (), catalog=5, refused=no)) == {"m": {"x"}}
    catalog = Catalog(version=6, models=(make_spec("m", 7),))
    assert barred(make_row("x", (), catalog=5, refused=no)) == {}
    catalog = Catalog(version=7)
    assert barred(make_row("x", (), catalog=7, refused=no)) == {}

"""Where requests go among the nodes of a cluster, by rows."""

import msgspec

from aegaeon.measures import Speed
from aegaeon.scheduler.among import NodeDispatcher
from aegaeon.scheduler.dispatch import LiveDispatcher, Prompt
from aegaeon.scheduler.places import HomeDispatcher
from tests.support.specs import make_instance

SPEED = Speed(token_s=0.001, load_s=2.0)
PROMPT = Prompt(1000)


def row(name, node, models=("m",), **status):
    found = make_instance(name, models, **status)
    return msgspec.structs.replace(found, record=msgspec.structs.replace(found.record, node=node))


def chosen(*rows, unseen=None, prompt=PROMPT, dispatcher=None):
    dispatcher = dispatcher or NodeDispatcher(HomeDispatcher)
    return dispatcher.dispatch(rows, "m", unseen or {}, prompt)


def test_on_one_node_it_is_the_policys_dispatcher_alone():
    rows = (row("i0", "a", load=0.5), row("i1", "a"))
    alone = LiveDispatcher(HomeDispatcher())
    assert chosen(*rows) == alone.dispatch(rows, "m", {}) == ("i1", "least_load")
    assert chosen(row("i0", "")) == ("i0", "only_one")
    assert chosen() is None
    assert chosen(row("i0", "a", models=("other",)), row("i1", "b", state="draining")) is None


def test_the_node_with_the_weights_is_taken_while_that_is_sooner():
    there = row("i0", "a", resident=("m",), ahead_s=1.5, speeds={"m": SPEED}, load=0.9)
    other = row("i1", "b")
    assert chosen(there, other) == ("i0", "resident")
    behind = row("i0", "a", resident=("m",), ahead_s=2.5, speeds={"m": SPEED}, load=0.9)
    assert chosen(behind, other) == ("i1", "least_wait")
    # What was sent there and not published counts, too: 1000 tokens each, 1 s.
    assert chosen(there, other, unseen={"i0": {"m": 1}}).instance == "i1"


def test_of_equal_waits_the_least_busy_node_is_taken():
    rows = (row("i0", "a", load=0.6, resident=("m",)), row("i1", "b", load=0.5, resident=("m",)))
    assert chosen(*rows).instance == "i1"


def test_only_nodes_that_serve_the_model_are_routed_to():
    rows = (row("i0", "a", models=("x",)), row("i1", "b", load=9.0), row("i2", "c", load=9.5))
    assert chosen(*rows).instance == "i1"
    decoder = msgspec.structs.replace(
        rows[0], record=msgspec.structs.replace(rows[0].record, role="decode", models=("m",))
    )
    assert chosen(decoder, *rows[1:]).instance == "i1"


def test_within_a_node_a_model_keeps_its_home_though_others_get_requests_between():
    dispatcher = NodeDispatcher(HomeDispatcher)
    here = (row("i0", "a", load=0.2), row("i1", "a", load=0.1))
    away = row("j0", "b", load=0.15, resident=("m",))
    assert chosen(*here, dispatcher=dispatcher).instance == "i1"
    assert chosen(*here, away, dispatcher=dispatcher).instance == "j0"
    home = (row("i0", "a"), row("i1", "a", running={"m": 1}, load=0.3))
    assert chosen(*home, dispatcher=dispatcher) == ("i1", "home")
    dispatcher.forget(frozenset(["b"]))
    assert set(dispatcher._within) == {"b"}


def test_a_node_that_has_kept_the_prompt_is_preferred_where_its_first_token_comes_sooner():
    rows = [
        row("i0", "a", resident=("m",), ahead_s=0.3, speeds={"m": SPEED}),
        row("i1", "b", resident=("m",), speeds={"m": SPEED}),
    ]
    assert chosen(*rows).instance == "i1"
    assert chosen(*rows, prompt=Prompt(1000, {"i0": 900})) == ("i0", "prefix")
    assert chosen(*rows, prompt=Prompt(1000, {"i0": 200})).instance == "i1"

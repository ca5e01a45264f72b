"""An instance serves what lives on its node, and lets go of what moves away."""

import pytest

from aegaeon.errors import Draining, Forgotten
from aegaeon.store.codec import decode_instance_message
from aegaeon.types import Declined, KvHandle, Transfer
from tests.support.policies import LIVE
from tests.support.serving import ServingBench
from tests.support.specs import make_request


@pytest.mark.parametrize("policy", LIVE)
def test_only_models_that_live_on_the_node_are_served(policy):
    bench = ServingBench(policy, node="x")
    for name in ("b", "c", "d"):
        bench.add(name)
    assert bench.row().record.models == ("a", "b", "c", "d")
    bench.place(a="x", b="xy", c="y")  # d has just come: it is nowhere yet, so it is everywhere
    assert bench.row().record.models == ("a", "b", "d")
    bench.row()
    bench.submit("r", "c")
    bench.submit("s", "b", arrival_s=bench.now)
    bench.work(60)
    last = {reply.request_id: reply for reply in bench.replies()}
    assert last["r"].code == Forgotten.code  # its proxy asks again, elsewhere
    assert last["s"].finish_reason == "length"
    assert bench.row().status.catalog == bench.catalog.read().version
    bench.place(a="x", b="y", c="xy", d="y")
    bench.row()
    assert bench.row().record.models == ("a", "c")
    bench.submit("t", "c", arrival_s=bench.now)
    bench.work(60)
    assert bench.ended("t").finish_reason == "length"
    assert bench.groups() <= {"a", "c"}


@pytest.mark.parametrize("policy", LIVE)
def test_a_model_that_leaves_takes_nothing_new_and_ends_what_it_has(policy):
    bench = ServingBench(policy, node="x")
    bench.add("b")
    bench.row()
    bench.submit("r", "b", max_tokens=6, arrival_s=bench.now)
    bench.turn()
    bench.place(a="x", b="y")
    row = bench.row()
    assert row.record.models == ("a",)
    # What was sent before is taken in.
    bench.submit("late", "b", max_tokens=6, arrival_s=bench.now)
    bench.work(3)
    # Others need not wait for it: the change is followed.
    assert bench.row().status.catalog == bench.catalog.read().version
    assert "b" in bench.groups()
    bench.work(100)
    last = {reply.request_id: reply for reply in bench.replies()}
    assert last["r"].finish_reason == last["late"].finish_reason == "length"
    bench.row()
    assert bench.groups() <= {"a"} and bench.held_kv() == 0


def test_a_model_that_comes_back_while_it_leaves_stays():
    bench = ServingBench(node="x")
    bench.add("b")
    bench.row()
    bench.submit("r", "b", max_tokens=6, arrival_s=bench.now)
    bench.turn()
    bench.place(a="x", b="y")
    assert bench.row().record.models == ("a",)
    bench.place(a="x", b="xy")
    assert bench.row().record.models == ("a", "b")
    bench.work(100)
    assert bench.ended("r").finish_reason == "length"
    bench.submit("s", "b", arrival_s=bench.now)
    bench.work(60)
    assert bench.ended("s").finish_reason == "length"


def test_a_request_that_is_handed_over_for_a_model_that_has_left_is_declined():
    bench = ServingBench(node="x")
    bench.add("b")
    bench.place(a="x", b="y")
    bench.row()
    bench.row()
    sender = bench.domain.create_mailbox("sender")
    kv = KvHandle(owner=99, blocks=(0,), cached_tokens=3)
    bench.send(Transfer(make_request("r", "b"), kv, "sender", bench.now + 1.0))
    bench.work(3)
    (answer,) = map(decode_instance_message, sender.receive(0.0))
    assert isinstance(answer, Declined) and answer.code == Draining.code


def test_where_the_store_has_forgotten_all_models_stay():
    bench = ServingBench(node="x")
    bench.place(a="x")
    bench.row()
    bench.catalog._catalog = type(bench.catalog.read())()
    assert bench.row().record.models == ("a",)

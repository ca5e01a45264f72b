"""Models that nobody asks for leave the device and the cache, and nobody else's place is taken."""

import msgspec
import pytest

from aegaeon.types import Cancel, InstanceStatus, Prefill, Preload
from tests.support.policies import LIVE
from tests.support.serving import RECORD, ServingBench

IDLE_S = 10.0


class IdleBench(ServingBench):
    """A bench with a model that goes when it is idle, which is here; what the cache is told."""

    def __init__(self, policy="slack", **changes):
        super().__init__(policy)
        self.let_go = []
        drop = self.engine.let_go

        def let_go(model, idle_s):
            self.let_go.append((model, idle_s))
            drop(model, idle_s)

        self.engine.let_go = let_go
        self.add("b", idle_s=IDLE_S, **changes)
        self.row()
        for model in ("a", "b"):
            self.submit(f"first-{model}", model, max_tokens=3, arrival_s=self.now)
        self.work(60)
        self.replies()

    def rest(self, seconds):
        """Let so much time pass."""
        for _ in range(round(seconds / 0.5)):
            self.now += 0.5
            self.turn()

    def publish_other(self, **status):
        record = msgspec.structs.replace(RECORD, id="other", mailbox="other.2")
        self.store.register_instance(record, 1e6)
        self.store.update_instance_status("other", 2, InstanceStatus(state="ready", **status))

    @property
    def is_here(self):
        return "b" in self.engine._resident


@pytest.mark.parametrize("policy", LIVE)
def test_one_that_nobody_asks_for_goes_and_comes_again(policy):
    bench = IdleBench(policy)
    if policy == "request":  # which keeps one at a time
        bench.submit("again", "b", max_tokens=3, arrival_s=bench.now)
        bench.work(60)
    assert bench.is_here
    bench.rest(IDLE_S - 1.0)
    assert bench.is_here and not bench.let_go
    bench.rest(2.0)
    assert not bench.is_here and bench.let_go == [("b", IDLE_S)]
    assert "b" not in bench.row().status.resident
    assert policy == "request" or "a" in bench.row().status.resident
    bench.submit("r", "b", max_tokens=3, arrival_s=bench.now)
    bench.work(100)
    assert bench.ended("r").finish_reason == "length"
    bench.rest(IDLE_S + 1.0)
    assert not bench.is_here and len(bench.let_go) == 2


def test_one_that_is_asked_for_stays():
    bench = IdleBench()
    for number in range(6):
        bench.rest(IDLE_S - 2.0)
        bench.submit(f"r{number}", "b", max_tokens=2, arrival_s=bench.now)
        bench.work(20)
        assert bench.is_here
    bench.submit("long", "b", max_tokens=1000, arrival_s=bench.now)
    bench.until(Prefill)
    bench.rest(3 * IDLE_S)
    assert bench.is_here and not bench.let_go
    bench.send(Cancel("long"))
    bench.turn()
    bench.compute.finish()
    bench.rest(IDLE_S + 1.5)
    assert not bench.is_here


def test_one_that_was_loaded_on_demand_stays_its_time():
    bench = IdleBench()
    bench.rest(3 * IDLE_S)
    assert not bench.is_here
    bench.send(Preload("b"))
    bench.work(5)
    assert bench.is_here
    bench.rest(IDLE_S - 1.0)
    assert bench.is_here
    bench.rest(2.0)
    assert not bench.is_here


def test_a_pinned_one_stays():
    bench = IdleBench(is_pinned=True)
    bench.rest(3 * IDLE_S)
    assert bench.is_here and not bench.let_go


@pytest.mark.parametrize("how", ["resident", "waiting"])
def test_the_cache_keeps_what_another_instance_has(how):
    bench = IdleBench()
    theirs = {"resident": ("b",)} if how == "resident" else {"waiting": {"b": 1}}
    bench.publish_other(**theirs)
    bench.rest(IDLE_S + 1.0)
    assert not bench.is_here and bench.let_go == [("b", None)]

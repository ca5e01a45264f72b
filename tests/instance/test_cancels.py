"""A cancel ends a request in whatever state it is at an instance, and nothing is held after."""

import pytest

from aegaeon.types import Cancel, Decode, Prefill, Stepped
from tests.support.policies import LIVE
from tests.support.serving import ServingBench

STATES = (
    "queued",
    "loading",
    "prefilling",
    "prefilled",
    "in a step",
    "decoding",
    "off its turn",
    "pre-empted",
    "prefilled again",
)


class CancelBench(ServingBench):
    """A bench with two models, whose engine can be told to take a request's KV away."""

    def __init__(self, policy):
        super().__init__(policy)
        self.add("b")
        self.row()
        self.robbed = set()
        execute = self.compute.run
        self.compute.run = lambda action: self._robbing(execute, action)

    def _robbing(self, execute, action):
        gone = self.robbed & set(getattr(action, "requests", ()))
        if not gone:
            return execute(action)
        self.robbed -= gone
        return Stepped(action.model, (), 0.001, preempted=tuple(gone), shortage="no room")

    def steps(self, claim, step_s=0.001):
        for _ in range(2000):
            self.now += step_s
            self.turn()
            if claim():
                return
            self.compute.finish()
            self.copy.finish()
        raise AssertionError("it did not come to that")

    def group(self, request="r"):
        scheduler = self.scheduler
        return scheduler._groups[scheduler._model_of[request]]

    def in_action(self, kind, request="r"):
        action = self.compute.action
        return isinstance(action, kind) and request in action.requests


def bring_to(bench, state):
    """Let request `r` come to `state`; `other`, of another model, may be there, too."""
    if state == "queued":  # behind one that is computed
        bench.submit("other", "b", max_tokens=2000, arrival_s=bench.now)
        bench.steps(lambda: isinstance(bench.compute.action, Decode))
    if state == "off its turn":
        bench.submit("r", max_tokens=2000, arrival_s=bench.now)
        bench.steps(lambda: bench.scheduler.snapshot().running)
        bench.submit("other", "b", max_tokens=2000, arrival_s=bench.now)
        bench.steps(lambda: bench.in_action(Decode, "other"), step_s=0.01)
        assert "r" in bench.group().running
        return
    bench.submit("r", max_tokens=2000, arrival_s=bench.now)
    match state:
        case "queued":
            bench.turn()
            assert "r" in bench.group().waiting
        case "loading":
            bench.turn()
            assert bench.copy.is_busy
        case "prefilling":
            bench.steps(lambda: bench.in_action(Prefill))
        case "prefilled":
            bench.steps(lambda: bench.in_action(Prefill))
            bench.compute.finish()  # and nobody has been told
        case "in a step":
            bench.steps(lambda: bench.in_action(Decode))
        case "decoding":
            bench.steps(lambda: bench.in_action(Decode))
            bench.compute.finish()
        case "pre-empted" | "prefilled again":
            bench.steps(lambda: bench.in_action(Decode))
            bench.robbed.add("r")
            bench.compute.finish()
            bench.steps(lambda: "r" in bench.group().waiting)
            if state == "prefilled again":
                bench.steps(lambda: bench.in_action(Prefill))


def assert_nothing_is_held(bench):
    scheduler, requests = bench.scheduler, bench.runtime._requests
    assert bench.held_kv() == 0 and scheduler._residency._kv_bytes == 0
    assert not scheduler._model_of and not scheduler._active and not scheduler._waiting_count
    assert not scheduler._shares._asker_of and not scheduler._shares._keys.known
    for group in scheduler._groups.values():
        assert not (group.waiting or group.running or group.leaving or group.here_tokens)
    assert not len(requests) and not requests._to_release and requests.departures.is_empty
    status = bench.status()
    assert (status.waiting, status.running) == ({}, {})


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("policy", LIVE)
def test_nothing_is_held_after_a_cancel(policy, state):
    if (policy, state) == ("request", "off its turn"):
        pytest.skip("this policy lets a request end before it turns to another model")
    bench = CancelBench(policy)
    bring_to(bench, state)
    bench.replies()
    for name in ("r", "other"):
        bench.send(Cancel(name))
        bench.turn()
    for _ in range(4):
        bench.compute.finish()
        bench.copy.finish()
        bench.turn()
    assert_nothing_is_held(bench)
    bench.work(20)
    assert bench.replies() == []
    # The room and the device are others'.
    bench.submit("next", "b", max_tokens=3, arrival_s=bench.now)
    bench.work(100)
    assert bench.ended("next").finish_reason == "length"
    assert_nothing_is_held(bench)

"""Two schedulers of one node whose cache holds one model: each load takes the other's weights."""

import itertools

import pytest

from aegaeon.scheduler.loads import MAX_LOSSES
from aegaeon.types import Idle, Load, Loaded, Switch, WeightsLost
from tests.support.policies import SHARING, make_scheduler
from tests.support.scripted import LOAD_S, STEP_S, ScriptedDevice
from tests.support.specs import make_request


def events_of(devices):
    for device in devices:
        if device._compute is not None:
            yield device._compute[0]
        if device._idle_until_s is not None:
            yield device._idle_until_s
        if device._copy is not None:
            yield device._copy[0]
            yield device._copy[0] - LOAD_S  # when it begins


class Node:
    """Loads are made one after another; when one begins, the other device has no weights left."""

    def __init__(self, policy, *models):
        self.devices = [
            ScriptedDevice(make_scheduler(policy, {model: 1}, 1), {model: 1}, 1) for model in models
        ]
        self.now = 0.0
        self.token_times = {model: [] for model in models}

    def run(self, until_s):
        while self.now < until_s and self.ask():
            due = [at for at in events_of(self.devices) if at > self.now]
            if not due:
                return
            self.now = min(due) + 1e-6  # with what is due at the same time
            for device in self.devices:
                made = sum(device.made.values())
                device.now = self.now
                device.finish()
                if sum(device.made.values()) > made:
                    self.token_times[next(iter(device.sizes))].append(self.now)

    def ask(self):
        for device, other in (self.devices, self.devices[::-1]):
            before, device.now = device._copy, self.now
            device.ask()
            if device._copy is not before and device._copy is not None:
                start_s = self.now if other._copy is None else max(self.now, other._copy[0])
                device._copy = (start_s + LOAD_S, device._copy[1])
        for device, other in (self.devices, self.devices[::-1]):
            if device._copy is not None and device._copy[0] - LOAD_S <= self.now:
                for model in tuple(other.resident):
                    other.lose(model)
        return any(device.known for device in self.devices)


@pytest.mark.parametrize("later_s", [0.0, LOAD_S / 2, LOAD_S + 0.01, 1.0, 2.3])
def test_both_get_on_and_neither_waits_for_long(policy, later_s):
    node = Node(policy, "a", "b")
    a, b = node.devices
    a.submit(make_request("ra", "a", max_tokens=500))
    node.run(later_s)
    b.now = node.now
    b.submit(make_request("rb", "b", max_tokens=500))
    node.run(200.0)
    assert a.ends == {"ra": "finished"} and b.ends == {"rb": "finished"}
    for times in node.token_times.values():
        waits = [later - sooner for sooner, later in itertools.pairwise(times)]
        assert max(waits) < 5.0
    # Not most of the time is spent on loads.
    loads = len(a.loads) + len(b.loads)
    assert loads * LOAD_S < 2 * 1000 * STEP_S


def lose_until_given_up(policy):
    scheduler = make_scheduler(policy, {"a": 1}, 1)
    scheduler.submit(make_request("r", "a", max_tokens=9), 0.0)
    now, tries, waits = 0.0, 0, []
    while not (given_up := scheduler.given_up()):
        asked_s = now
        while (load := scheduler.next_load(now)) is None:
            action = scheduler.next_action(now)
            assert isinstance(action, Idle) and action.until_s > now
            now = action.until_s
        waits.append(now - asked_s)
        assert load == Load("a")
        scheduler.complete(Loaded("a", 1, 0.1), now)
        assert scheduler.next_action(now) == Switch("a")
        scheduler.complete(WeightsLost("a"), now)
        tries += 1
        assert tries <= 100
    return scheduler, now, waits, given_up


@pytest.mark.parametrize("policy", SHARING)
def test_weights_lost_again_and_again_are_waited_for_longer_and_then_given_up(policy):
    scheduler, now, waits, given_up = lose_until_given_up(policy)
    assert waits[:5] == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.4])
    assert len(waits) == MAX_LOSSES and max(waits) <= 4.0 and 10.0 < now < 40.0
    ((request, code, message),) = given_up
    assert (request, code) == ("r", "budget_too_small")
    assert "raise --model-cache-budget-gb" in message
    scheduler.cancel("r", now)
    assert scheduler.given_up() == ()


def test_a_model_that_was_given_up_is_tried_again_later(policy):
    scheduler, now, _, _ = lose_until_given_up(policy)
    scheduler.cancel("r", now)
    scheduler.submit(make_request("s", "a"), now)
    assert scheduler.next_load(now) is None
    action = scheduler.next_action(now)
    assert isinstance(action, Idle) and now < action.until_s <= now + 4.0
    assert scheduler.next_load(action.until_s) == Load("a")

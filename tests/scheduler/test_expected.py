"""Schedulers that are told how much of a prompt need not be run."""

import pytest

from aegaeon.metrics import Target
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.ledger import Limits
from aegaeon.scheduler.policies import POLICIES, Fleet
from aegaeon.scheduler.residency import Residency
from aegaeon.types import Load, Loaded, Prefill, Switch, Switched
from tests.support.specs import make_request

TOKEN_S = 0.01
LIMIT = 1000  # tokens of a prefill


def make(policy):
    cost = ModelCost(1e-9, 0.0, 10**6, (TOKEN_S, 0.0, 1e-6), (0.0, 0.0, 0.02))
    costs = Costs(1.0, 1.0, {"a": cost}, ("a",))
    limits = Limits(prefill_tokens=LIMIT, prefill_requests=8)
    fleet = Fleet(target=Target(20.0, 0.1), limits=limits)
    return POLICIES[policy].scheduler(Residency({"a": 1}, 1), costs, fleet, "colocated")


def submit(scheduler, name, tokens, known=0, now=0.0):
    scheduler.submit(make_request(name, "a", prompt_token_ids=(1,) * tokens), now)
    if known:
        scheduler.expect(name, known, now)


def prefill(scheduler, now=0.0):
    assert scheduler.next_load(now) == Load("a")
    scheduler.complete(Loaded("a", 1, 0.1), now)
    assert scheduler.next_action(now) == Switch("a")
    scheduler.complete(Switched("a", 0.0), now)
    action = scheduler.next_action(now)
    assert isinstance(action, Prefill)
    return action.requests


def test_what_waits_to_be_run_is_published_and_follows_what_is_known(policy):
    scheduler = make(policy)
    assert scheduler.snapshot().to_prefill == {}
    submit(scheduler, "r", 544, known=480)
    submit(scheduler, "s", 100)
    assert scheduler.snapshot().to_prefill == {"a": 164}
    scheduler.expect("r", 0, 0.1)  # others took the room
    assert scheduler.snapshot().to_prefill == {"a": 644}
    scheduler.expect("s", 96, 0.2)
    scheduler.expect("nobody", 96, 0.2)
    assert scheduler.snapshot().to_prefill == {"a": 548}
    for name in "rs":
        scheduler.cancel(name, 0.3)
        scheduler.expect(name, 32, 0.3)
    assert scheduler.snapshot().to_prefill == {"a": 0}


def test_prompts_that_are_known_are_prefilled_together():
    scheduler = make("slack")
    for name in "rst":
        submit(scheduler, name, 900, known=880)
    assert prefill(scheduler) == tuple("rst")
    again = make("slack")
    for name in "rst":
        submit(again, name, 900, known=880)
        again.expect(name, 0, 0.0)
    assert prefill(again) == ("r",)


@pytest.mark.parametrize("known", [0, 880])
def test_a_device_is_no_busier_than_what_it_has_to_run(known):
    scheduler, other = make("slack"), make("slack")
    submit(scheduler, "r", 900, known)
    submit(other, "r", 900 - known)
    assert scheduler.load == pytest.approx(other.load, abs=1e-6)
    scheduler.expect("r", 0, 0.0)
    submit(whole := make("slack"), "r", 900)
    assert scheduler.load == pytest.approx(whole.load, abs=1e-6)


def test_nothing_that_turns_out_to_be_known_late_makes_a_device_less_than_idle():
    scheduler = make("slack")
    submit(scheduler, "r", 900)
    idle = make("slack")
    submit(idle, "r", 1)
    scheduler.expect("r", 896, 300.0)
    assert scheduler.load == pytest.approx(idle.load, abs=0.05)

"""What schedulers keep count of, when actions end otherwise than they were meant to."""

import pytest

from aegaeon.errors import Overloaded
from aegaeon.metrics import Target
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.ledger import Limits
from aegaeon.scheduler.policies import POLICIES, Fleet
from aegaeon.scheduler.residency import Residency
from aegaeon.types import (
    Decode,
    Idle,
    Load,
    Loaded,
    LoadFailed,
    NewToken,
    Prefill,
    Stepped,
    Switch,
    Switched,
    WeightsLost,
)
from tests.support.specs import make_request

every_policy = pytest.mark.parametrize("policy", sorted(POLICIES))


def make(policy, *, budget=1, step_s=0.02, role="colocated", kv=None):
    cost = ModelCost(1e-9, 0.0, 10**6, (1e-5, 0.0, 0.01), (0.0, 0.0, step_s))
    costs = Costs(1.0, 1.0, {"a": cost, "b": cost}, ("a",))
    residency = Residency({"a": 1, "b": 1}, budget, kv)
    fleet = Fleet(target=Target(10.0, 0.1), limits=Limits(max_batch=16))
    return POLICIES[policy].scheduler(residency, costs, fleet, role)


def load(scheduler, now, model):
    assert scheduler.next_load(now) == Load(model)
    scheduler.complete(Loaded(model, 1, 0.1), now)


def begin_prefill(scheduler, now):
    action = scheduler.next_action(now)
    if isinstance(action, Switch):
        scheduler.complete(Switched(action.model, 0.0), now)
        action = scheduler.next_action(now)
    assert isinstance(action, Prefill)
    return action


@every_policy
@pytest.mark.parametrize("trouble", [WeightsLost("a"), LoadFailed("a", "x", "y")])
def test_a_prefill_that_came_to_nothing_reserves_nothing(policy, trouble):
    scheduler = make(policy)
    now = 0.0
    for number in range(3):
        prompt = (1,) * 1000
        scheduler.submit(make_request(f"r{number}", "a", prompt_token_ids=prompt), now)
        load(scheduler, now, "a")
        begin_prefill(scheduler, now)
        scheduler.complete(trouble, now)
        scheduler.cancel(f"r{number}", now)
        assert scheduler._groups["a"].here_tokens == 0
        now += 100.0


@every_policy
def test_kv_that_does_not_arrive_is_not_held(policy):
    scheduler = make(policy, budget=10**6, role="decode", kv={"a": 1, "b": 1})
    scheduler.adopt(make_request("r", "a", prompt_token_ids=(1,) * 1000), 0.0)
    action = scheduler.next_load(0.0)
    assert action.bring == (() if policy == "request" else ("r",))  # it loads weights first
    scheduler.complete(LoadFailed("a", "x", "y"), 0.0)
    assert scheduler._groups["a"].here_tokens == 0
    assert scheduler._residency.held_bytes == 0


def decoding_a_with_b_waiting(step_s, b_arrives_s):
    """`a` decodes a request without end, with the only room; `b` comes later."""
    scheduler = make("slack", step_s=step_s)
    scheduler.submit(make_request("r", "a", max_tokens=10**9), 0.0)
    load(scheduler, 0.0, "a")
    begin_prefill(scheduler, 0.0)
    scheduler.complete(Stepped("a", (NewToken("r", 1),), step_s), 0.0)
    now, has_come = 0.0, False
    while now < 600.0:
        if not has_come and now >= b_arrives_s:
            scheduler.submit(make_request("s", "b", arrival_s=now), now)
            has_come = True
        action = scheduler.next_action(now)
        found = scheduler.next_load(now)
        if found is not None:
            yield now, found, scheduler
        if isinstance(action, Decode):
            now += step_s
            scheduler.complete(Stepped("a", (NewToken("r", 1),), step_s), now)
        elif isinstance(action, Switch):
            scheduler.complete(Switched(action.model, 0.0), now)
        else:
            assert isinstance(action, Idle)
            now += 0.1


@pytest.mark.parametrize("step_s", [0.02, 0.097, 0.098])
def test_who_is_not_here_is_loaded_before_long(step_s):
    now, found, _ = next(decoding_a_with_b_waiting(step_s, 3.0))
    assert found.model == "b" and now < 90.0


def test_a_load_that_is_tried_again_does_not_wait_for_events():
    loads = decoding_a_with_b_waiting(0.02, 60.0)
    now, found, scheduler = next(loads)
    assert found == Load("b", ("a",))
    scheduler.complete(WeightsLost("b"), now)
    assert scheduler.snapshot().resident == ()
    now, found, scheduler = next(loads)
    assert found.model == "a"
    scheduler.complete(Loaded("a", 1, 0.1), now)
    later, found, _ = next(loads)
    assert found.model == "b" and later < now + 60.0


def test_an_idle_device_is_not_busy():
    scheduler = make("slack")
    scheduler.submit(make_request("r", "a", prompt_token_ids=(1,) * 100_000), 0.0)
    assert scheduler.load > 0.04
    scheduler.cancel("r", 1.0)
    scheduler.next_action(1.0)
    scheduler.next_action(3600.0)
    assert scheduler.load == pytest.approx(0.0, abs=1e-9)


def test_a_resumed_request_has_its_patience_anew():
    scheduler = make("request")
    scheduler.submit(make_request("r", "a", arrival_s=0.0, generated_token_ids=(1,) * 50), 60.0)
    assert scheduler.given_up() == ()
    scheduler.submit(make_request("s", "b", arrival_s=76.0), 76.0)
    assert [failure[0] for failure in scheduler.given_up()] == ["r"]


@every_policy
def test_what_is_told_of_requests_is_up_to_date(policy):
    scheduler = make(policy, budget=2)
    prompt = (1,) * 100
    for name, model in [("r", "a"), ("s", "b"), ("t", "b")]:
        scheduler.submit(make_request(name, model, prompt_token_ids=prompt), 0.0)
    assert scheduler.snapshot().to_prefill == {"a": 100, "b": 200}
    load(scheduler, 0.0, "a")
    begin_prefill(scheduler, 0.0)
    assert scheduler.snapshot().waiting == {"a": 1, "b": 2}
    scheduler.complete(Stepped("a", (NewToken("r", 1),), 0.02), 0.02)
    told = scheduler.snapshot()
    assert (told.waiting, told.running) == ({"b": 2}, {"a": 1})
    scheduler.expect("s", 60, 0.02)
    assert scheduler.snapshot().to_prefill == {"a": 0, "b": 140}
    scheduler.cancel("t", 0.02)
    assert scheduler.snapshot().to_prefill == {"a": 0, "b": 40}
    assert isinstance(scheduler.next_action(0.02), Decode)
    scheduler.complete(Stepped("a", (NewToken("r", 1, "length"),), 0.02), 0.04)
    told = scheduler.snapshot()
    assert (told.waiting, told.running) == ({"b": 1}, {})
    assert scheduler.end_model("a") and scheduler.snapshot().to_prefill == {"b": 40}


def test_a_model_whose_request_is_refused_is_told_of():
    scheduler = make("slack")
    scheduler.bound(max_waiting=1, max_running=1)
    scheduler.submit(make_request("r", "a"), 0.0)
    assert scheduler.snapshot().to_prefill == {"a": 3}
    with pytest.raises(Overloaded):
        scheduler.submit(make_request("s", "b"), 0.0)
    assert scheduler.snapshot().to_prefill == {"a": 3, "b": 0}

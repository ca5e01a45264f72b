"""The policy `slack` on one simulated device: who waits for whom, and how often it switches."""

import pytest

from aegaeon.metrics import Target, time_to_first_token_s
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.policies import POLICIES, Fleet
from aegaeon.scheduler.residency import Residency
from aegaeon.sim.cluster import simulate
from aegaeon.sim.fleets import make_fleet
from aegaeon.sim.workloads import Arrival
from aegaeon.types import Begun, Loaded, NewToken, Prefill, Stepped, Switch, Switched
from tests.support.specs import make_request

STEP_S = 0.01
COST = ModelCost(8.0, 5e-3, 4096, (2e-5, 1e-10, 0.02), (0.0, 0.0, STEP_S))
COSTS = Costs(16.0, 80.0, dict.fromkeys("abc", COST), ("a",))


def run(*arrivals, target=Target()):  # noqa: B008  frozen
    """All models fit; requests are (time, model, output tokens), prompts short."""
    load = tuple(sorted(Arrival(at_s, model, 32, tokens) for at_s, model, tokens in arrivals))
    models = {arrival.model: COST for arrival in load}
    fleet = make_fleet("slack", 1, target)
    return simulate(load, models, COSTS, POLICIES["slack"], fleet)


def first_token_s(result, model, arrival_s):
    (one,) = [s for s in result.served if (s.model, s.arrival_s) == (model, arrival_s)]
    return time_to_first_token_s(one.arrival_s, one.token_times_s)


def test_on_an_idle_device_a_newcomer_does_not_wait_for_a_turn_to_end():
    # By then `a` is far ahead of its deadlines, and `b` has been loaded long ago.
    result = run((0.0, "b", 1), (5.0, "a", 2000), (10.0, "b", 50))
    assert first_token_s(result, "b", 10.0) < 0.1


def test_nor_for_one_that_has_just_begun():
    result = run((0.0, "b", 1), (5.0, "a", 2000), (6.125, "b", 50))
    # `a` is first made safe for some seconds, which takes a tenth of them.
    assert first_token_s(result, "b", 6.125) < 0.5


def test_on_an_idle_device_a_newcomer_joins_those_of_its_model_at_once():
    result = run((0.0, "a", 2000), (8.0, "a", 50))
    assert first_token_s(result, "a", 8.0) < 0.1


def test_newcomers_of_two_models_come_one_after_the_other():
    begun = [(0.0, "a", 1), (2.0, "b", 1)]
    result = run(*begun, (6.0, "c", 2000), (12.0, "a", 20), (12.0, "b", 20))
    assert max(first_token_s(result, name, 12.0) for name in "ab") < 1.0
    assert sum(usage.switches for usage in result.usage) < 12


def test_models_that_are_all_late_take_turns_of_some_tokens():
    # Each alone takes two thirds of the device.
    result = run(*((0.0, name, 1000) for name in "ab"), target=Target(1.0, 1.6 * STEP_S))
    assert sum(len(one.token_times_s) for one in result.served) == 2000
    assert sum(usage.switches for usage in result.usage) < 50


@pytest.mark.parametrize("begun", [(), (Begun("late", 2, 0),)])
def test_a_stream_goes_on_beside_a_prompt_that_waits_for_its_grammar(begun):
    residency = Residency({"a": 1}, 1)
    scheduler = POLICIES["slack"].scheduler(residency, COSTS, Fleet(), "colocated")
    scheduler.submit(make_request("r", "a", max_tokens=1000), 0.0)
    assert scheduler.next_load(0.0).model == "a"
    scheduler.complete(Loaded("a", 1, 0.1), 0.1)
    assert scheduler.next_action(0.1) == Switch("a")
    scheduler.complete(Switched("a", 0.0), 0.1)
    steps = ""
    for at in range(20):
        now = 0.1 + STEP_S * at
        if at == 5:
            scheduler.submit(make_request("late", "a"), now)
        action = scheduler.next_action(now)
        is_prefill = isinstance(action, Prefill)
        steps += "p" if is_prefill else "d"
        tokens = tuple(NewToken(one, 5) for one in action.requests if one != "late")
        told = begun if is_prefill and not tokens else ()
        scheduler.complete(Stepped("a", tokens, STEP_S, begun=told), now + STEP_S)
    assert steps.count("p") > 5 and "pp" not in steps, steps

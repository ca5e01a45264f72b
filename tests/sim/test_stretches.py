"""Stretches only save time: policies decide the same when they are asked after every step."""

import msgspec
import pytest

from aegaeon.metrics import Target
from aegaeon.scheduler.paper import PaperRules
from aegaeon.scheduler.policies import POLICIES, paper, request
from aegaeon.scheduler.request import RequestRules
from aegaeon.sim.cluster import simulate
from aegaeon.sim.fleets import make_fleet
from aegaeon.sim.pace import Pace
from tests.support.simulated import COSTS, make_case

CASES = {
    **POLICIES,
    "paper, new batches wait for a round": paper(PaperRules(joins_round=False)),
    "paper, all stays": paper(PaperRules(keeps_resident=True)),
    "request, the tail first": request(RequestRules(serves_tail=True)),
    "request, used is who computed": request(RequestRules(used_is_computed=True)),
    "request, those that wait queue": request(RequestRules(counts_running=False)),
}


def times(policy, case, prefill, switch_s):
    load, models = case
    fleet = make_fleet(policy.name, 4, Target(), prefill)
    costs = msgspec.structs.replace(COSTS, switch_s=switch_s)
    served = simulate(load, models, costs, policy, fleet).served
    return sorted((one.arrival_s, one.model, tuple(one.token_times_s)) for one in served)


@pytest.mark.parametrize("prefill", [0, 2])
@pytest.mark.parametrize("switch_s", [0.005, 2.0**-12])  # seldom, or after every few steps
@pytest.mark.parametrize("name", CASES)
def test_nothing_comes_out_otherwise_when_every_step_is_a_decision(
    name, switch_s, prefill, monkeypatch
):
    case = make_case(models=12, rate=0.3, horizon_s=15.0, seed=3)
    in_stretches = times(CASES[name], case, prefill, switch_s)
    monkeypatch.setattr(Pace, "steps_of", lambda *_: 1)
    assert times(CASES[name], case, prefill, switch_s) == in_stretches

"""A device at rest begins with a model while its weights come."""

import msgspec
import pytest

from aegaeon.metrics import Target
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.policies import POLICIES
from aegaeon.sim.cluster import simulate
from aegaeon.sim.fleets import make_fleet
from aegaeon.sim.workloads import Arrival
from tests.support.simulated import make_case

PREFILL_S, STEP_S, LOAD_S, SWITCH_S, REST_S = 0.25, 0.125, 1.0, 0.0625, 0.03125
COST = ModelCost(
    weight_gb=LOAD_S, kv_gb_per_token=0.0, max_len=512, prefill=(0.0, 0.0, PREFILL_S),
    decode=(0.0, 0.0, STEP_S),
)  # fmt: skip
COSTS = Costs(
    link_gb_per_s=1.0, device_memory_gb=8.0, models={"m": COST}, model_mix=("m",), switch_s=SWITCH_S
)


def first_tokens(rest_s, load, weight_gb=LOAD_S):
    """When each request of `load` has its first token, by its model."""
    costs = msgspec.structs.replace(COSTS, rest_s=rest_s)
    cost = msgspec.structs.replace(COST, weight_gb=weight_gb)
    models = {one.model: cost for one in load}
    fleet = make_fleet("slack", 1, Target(), None)
    served = simulate(load, models, costs, POLICIES["slack"], fleet).served
    assert all(one.is_complete for one in served)
    return {one.model: one.token_times_s[0] for one in served}


@pytest.mark.parametrize(
    ("rest_s", "weight_gb", "expected_s"),
    [
        (None, LOAD_S, LOAD_S + SWITCH_S + PREFILL_S),
        (REST_S, LOAD_S, LOAD_S),  # the load takes longer than all of it
        (REST_S, 0.125, REST_S + SWITCH_S + PREFILL_S),
        (REST_S, REST_S / 2, REST_S / 2 + SWITCH_S + PREFILL_S),
    ],
)
def test_a_first_token_waits_for_the_longer_of_load_and_prefill(rest_s, weight_gb, expected_s):
    times = first_tokens(rest_s, (Arrival(0.0, "m", 8, 4),), weight_gb)
    assert times["m"] == pytest.approx(expected_s, abs=1e-6)


def test_the_link_is_busy_until_all_weights_are_in():
    load = (Arrival(0.0, "m", 8, 1), Arrival(0.0, "n", 8, 1))
    times = first_tokens(REST_S, load, 4 * LOAD_S)
    assert sorted(times.values()) == pytest.approx([4 * LOAD_S, 8 * LOAD_S])


@pytest.mark.parametrize("name", list(POLICIES))
def test_whole_runs_end_alike_and_no_later(name):
    load, models = make_case(models=12, rate=0.2)
    fleet = make_fleet(name, 4, Target(), None)
    ends = []
    for rest_s in (None, REST_S):
        costs = msgspec.structs.replace(COSTS, device_memory_gb=40.0, rest_s=rest_s)
        result = simulate(load, models, costs, POLICIES[name], fleet)
        assert len(result.served) == len(load)
        ends.append(sum(len(one.token_times_s) for one in result.served))
    assert ends[1] >= ends[0]

"""Costs that follow what actions take, through the scheduler that hears of them."""

import pytest

from aegaeon.metrics import Target
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.learning import LearningCosts
from aegaeon.scheduler.policies import POLICIES, Fleet
from aegaeon.scheduler.residency import Residency
from tests.support.scripted import LOAD_S, STEP_S, ScriptedDevice
from tests.support.specs import make_request

COST = ModelCost(
    weight_gb=1e-9, kv_gb_per_token=0.0, max_len=4096, prefill=(1e-4, 0.0, 0.01),
    decode=(1e-6, 1e-3, 0.2),
)  # fmt: skip
COSTS = Costs(link_gb_per_s=1.0, device_memory_gb=1.0, models={"a": COST, "b": COST},
              model_mix=("a",))  # fmt: skip


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_policy_knows_soon_what_steps_and_loads_take(policy):
    learning = LearningCosts(COSTS, ("a",))
    residency = Residency({"a": 1, "b": 1}, 2)
    fleet = Fleet(target=Target(10.0, 0.1))
    scheduler = POLICIES[policy].scheduler(residency, learning.costs, fleet, "colocated")
    scheduler.observer = learning
    device = ScriptedDevice(scheduler, {"a": 1, "b": 1}, 2)
    for model in "ab":
        device.submit(make_request(model, model, max_tokens=80))
    device.advance(60.0)
    assert device.ends == {"a": "finished", "b": "finished"}
    for model in "ab":
        cost = learning.costs.models[model]
        assert cost.decode_s(50, 1) == pytest.approx(STEP_S, rel=0.1)
        assert cost.prefill_s(3) < 1.5 * STEP_S
        assert 0.0 < learning.costs.load_s(cost) <= LOAD_S * 1.01
    assert COSTS.models["a"] == COST  # what was read is left alone


def test_the_pace_is_what_steps_took_against_what_was_said_before():
    learning = LearningCosts(COSTS, ("a",))
    learning.prefilled("a", (100, 300), (0, 0), 0.12)
    learning.decoded("b", (50, 60), 0.4)
    assert learning.pace.took_s == pytest.approx(0.52)
    expected_s = COST.prefill_s(100) + COST.prefill_s(300) + COST.decode_s(110, 2)
    assert learning.pace.expected_s == pytest.approx(expected_s)


def test_what_was_cached_is_not_learned_to_be_quick():
    """The time of a prefill is that of the tokens it ran, behind those it found."""
    whole, behind = LearningCosts(COSTS, ("a",)), LearningCosts(COSTS, ("a",))
    for _ in range(50):
        whole.prefilled("a", (1000,), (0,), COST.prefill_s(1000))
        took_s = COST.prefill_s(200, 1000**2 - 800**2)
        behind.prefilled("a", (1000,), (800,), took_s)
    for learning in (whole, behind):
        learned = learning.costs.models["a"]
        assert learned.prefill_s(1000) == pytest.approx(COST.prefill_s(1000), rel=0.02)
    assert behind.pace.expected_s == pytest.approx(behind.pace.took_s)

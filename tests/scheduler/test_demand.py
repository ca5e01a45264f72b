"""What a flow of requests takes, against a count of the steps that it needs."""

import statistics

import pytest

from aegaeon.metrics import Target
from aegaeon.scheduler.cost import ModelCost
from aegaeon.scheduler.demand import FULL, Flow, busy, loads_per_s
from aegaeon.sim.workloads import poisson_of
from benchmark.simulate_bounds import device_seconds

COST = ModelCost(14.0, 4e-4, 8192, (1.5e-5, 0.0, 0.016), (2.6e-7, 7.6e-5, 0.0086))
LENGTHS = [(100, 40), (900, 200), (2500, 350), (400, 1)]


def counted(rate, target=Target()):  # noqa: B008  frozen
    load = poisson_of({"m": rate}, max(400.0, 120.0 / rate), LENGTHS, seed=3)
    lasts_s = load[-1].at_s
    prompt = statistics.mean(one.prompt_tokens for one in load)
    output = statistics.mean(one.output_tokens for one in load)
    seconds = sum(took for _, took in device_seconds(load, COST, target))
    return Flow(len(load) / lasts_s, prompt, output), seconds / lasts_s


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("target", [Target(), Target(5.0, 0.05)])
def test_a_device_is_as_busy_as_its_steps_make_it(rate, target):
    flow, seconds = counted(rate, target)
    assert busy(flow, COST, target) == pytest.approx(seconds, rel=0.25)


def test_more_than_a_device_is_split_and_each_part_has_its_own_steps():
    flow = Flow(60.0, 900.0, 150.0)
    whole = busy(flow, COST, Target())
    assert whole > 2 * FULL
    parts = round(whole / FULL + 0.5)
    each = busy(Flow(60.0 / parts, 900.0, 150.0), COST, Target())
    assert each <= FULL and whole == pytest.approx(parts * each, rel=0.2)


def test_more_requests_take_more_and_none_take_nothing():
    found = [busy(Flow(rate, 500.0, 200.0), COST, Target()) for rate in (0, 0.1, 1, 4, 40, 400)]
    assert found == sorted(found) and found[0] == 0.0


def test_a_step_that_takes_longer_than_promised_still_has_an_answer():
    slow = ModelCost(14.0, 4e-4, 8192, (1e-3, 0.0, 0.1), (1e-6, 1e-2, 0.5))
    assert 0 < busy(Flow(3.0, 500.0, 100.0), slow, Target()) < 1e4


def test_weights_come_again_only_where_requests_do_not_overlap():
    rare, frequent = Flow(0.001, 500.0, 200.0), Flow(1.0, 500.0, 200.0)
    assert loads_per_s(rare, Target()) == pytest.approx(0.001, rel=0.05)
    assert loads_per_s(frequent, Target()) < 1e-6

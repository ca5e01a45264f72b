"""Nodes under one placement: nothing is lost, whoever moves goes on, and one node is a machine."""

import dataclasses
from collections import Counter, defaultdict

import msgspec
import pytest

from aegaeon.errors import ConfigError
from aegaeon.metrics import Target, attainment
from aegaeon.scheduler.demand import Flow
from aegaeon.scheduler.placement import Rules
from aegaeon.scheduler.policies import POLICIES
from aegaeon.sim.cluster import simulate
from aegaeon.sim.fleets import make_fleet
from aegaeon.sim.nodes import NodeLoss, Nodes, Setup, Timing, node_of, simulate_nodes
from aegaeon.sim.workloads import models_of, poisson_of, prepare
from tests.support.simulated import COSTS, LENGTHS, make_case

every_policy = pytest.mark.parametrize("name", list(POLICIES))


def setup_of(models, count=3, devices=2, name="slack", cache_gb=200.0, **more):
    nodes = [node_of(f"n{index}", COSTS, devices, cache_gb, 10.0) for index in range(count)]
    return Setup(POLICIES[name], Target(), COSTS, models, nodes, **more)


def flows_of(load, horizon_s=40.0):
    groups = defaultdict(list)
    for one in load:
        groups[one.model].append(one)
    return {
        model: Flow(
            len(group) / horizon_s,
            sum(one.prompt_tokens for one in group) / len(group),
            sum(one.output_tokens for one in group) / len(group),
        )
        for model, group in groups.items()
    }


def run(load, setup, losses=()):
    return simulate_nodes(load, setup, flows_of(load), losses)


def asked(load):
    return sorted((one.model, one.output_tokens) for one in load)


def got(result):
    return sorted((one.model, len(one.token_times_s)) for one in result.served)


@every_policy
def test_one_node_does_what_one_machine_does(name):
    load, models = make_case(rate=0.2)
    result = run(load, setup_of(models, count=1, devices=4, name=name))
    alone = simulate(load, models, COSTS, POLICIES[name], make_fleet(name, 4))
    key = lambda one: (one.arrival_s, one.model, list(one.token_times_s))  # noqa: E731
    assert sorted(map(key, result.served)) == sorted(map(key, alone.served))
    assert result.usage["n0"] == alone.usage


@every_policy
@pytest.mark.parametrize("seed", [1, 2])
def test_every_request_ends_with_all_its_tokens_though_nodes_are_lost(name, seed):
    load, models = make_case(models=12, rate=0.15, seed=seed)
    setup = setup_of(models, name=name, timing=Timing(epoch_s=10.0, notice_s=3.0))
    result = run(load, setup, [NodeLoss(12.0, "n1"), NodeLoss(25.0, "n0")])
    assert len(result.served) == len(load)
    if name != "request":  # which drops those that waited long
        assert got(result) == asked(load)
    assert result.resumed > 0
    for one in result.served:
        times = [one.arrival_s, *one.token_times_s]
        assert times == sorted(times)


def test_a_lost_nodes_models_come_to_others_and_their_requests_wait_for_them():
    load, models = make_case(models=6, rate=0.3)
    setup = setup_of(models, timing=Timing(epoch_s=1e6, notice_s=3.0))
    before = Nodes(setup, flows_of(load))._where
    lost = [model for model, nodes in before.items() if nodes == ("n1",)]
    result = run(load, setup, [NodeLoss(10.0, "n1")])
    assert sorted(fetch.move.model for fetch in result.fetches) == sorted(lost) and lost
    came = {fetch.move.model: fetch.came_s for fetch in result.fetches}
    for fetch in result.fetches:
        assert fetch.move.why == "lost" and fetch.asked_s == 13.0
        size_gb = models[fetch.move.model].weight_gb
        assert fetch.came_s >= 13.0 + size_gb / 10.0 - 1e-9
    for one in result.served:
        if one.model in lost and one.arrival_s > 10.0:
            assert one.token_times_s[0] > came[one.model]


def test_weights_come_one_after_the_other_over_a_wire():
    load, models = make_case(models=8, rate=0.3)
    result = run(load, setup_of(models, count=2), [NodeLoss(5.0, "n1")])
    came = sorted(fetch.came_s for fetch in result.fetches)
    sizes = [models[fetch.move.model].weight_gb for fetch in result.fetches]
    assert len(came) > 1 and came[-1] == pytest.approx(10.0 + sum(sizes) / 10.0)


def test_a_model_that_gets_busy_gets_another_node_and_streams_go_on():
    rates = {"a": 0.2, "b": 0.2, "c": 0.2}
    calm = poisson_of(rates, 60.0, LENGTHS, seed=1)
    rush = poisson_of({**rates, "a": 14.0}, 60.0, LENGTHS, seed=2)
    moved = tuple(msgspec.structs.replace(one, at_s=one.at_s + 60.0) for one in rush)
    load, models = prepare([(*calm, *moved)], COSTS, 0.0, 120.0, 1)
    setup = setup_of(models, count=2, devices=1, timing=Timing(epoch_s=20.0, recent=0.8))
    result = simulate_nodes(load, setup, flows_of(load[: len(calm)], 60.0))
    assert {fetch.move.why for fetch in result.fetches} >= {"busier"}
    assert got(result) == asked(load)
    alone = dataclasses.replace(setup, timing=Timing(epoch_s=1e6))
    stays = simulate_nodes(load, alone, flows_of(load[: len(calm)], 60.0))
    assert not stays.fetches
    kept, not_kept = (attainment(one.served, Target()).request for one in (result, stays))
    assert kept > not_kept


def test_a_crowded_nodes_model_is_served_there_until_it_has_come_elsewhere():
    load, models = make_case(models=10, rate=0.25)
    setup = setup_of(models, count=2, rules=Rules(full=0.2), timing=Timing(epoch_s=5.0, recent=1.0))
    flows = {model: Flow(0.001, 100.0, 10.0) for model in models_of(load)}
    result = simulate_nodes(load, setup, flows)
    crowded = [fetch for fetch in result.fetches if fetch.move.why == "crowded"]
    assert crowded
    assert got(result) == asked(load)
    for fetch in crowded:
        for one in result.served:  # nobody waits for weights on the wire
            if one.model == fetch.move.model and fetch.asked_s < one.arrival_s < fetch.came_s:
                assert one.token_times_s[0] - one.arrival_s < 6.0


def test_a_model_without_room_anywhere_fails_its_requests_and_no_others():
    load, models = make_case(models=4, rate=0.3)
    result = run(load, setup_of(models, count=1, cache_gb=30.0))
    failed = Counter(one.is_failed for one in result.served)
    assert failed[True] and failed[False]
    lost = {one.model for one in result.served if one.is_failed}
    assert lost.isdisjoint(one.model for one in result.served if not one.is_failed)


def test_twice_the_same_run_is_the_same():
    load, models = make_case(models=12, rate=0.3)
    first, second = (run(load, setup_of(models), [NodeLoss(9.0, "n2")]) for _ in range(2))
    assert first.fetches == second.fetches and first.usage == second.usage


def test_two_nodes_serve_nearly_twice_as_much_as_one():
    """Goodput within the promise, of a load that is too much for one node."""
    load, models = make_case(models=24, rate=0.5)
    kept = {}
    for count in (1, 2):
        served = run(load, setup_of(models, count=count, devices=4, cache_gb=400.0)).served
        kept[count] = attainment(served, Target(2.0, 0.05)).request
    assert kept[2] >= 1.8 * kept[1]


def test_a_node_that_is_not_there_cannot_be_lost():
    load, models = make_case()
    with pytest.raises(ConfigError, match="no node 'x'"):
        run(load, setup_of(models), [NodeLoss(1.0, "x")])

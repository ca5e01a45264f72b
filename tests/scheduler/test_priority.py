"""Priorities of models: who comes first where a device cannot do all, and that nobody starves."""

import itertools
import random
from dataclasses import replace

import msgspec
import pytest

from aegaeon.errors import Overloaded
from aegaeon.metrics import Target, time_to_first_token_s
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.policies import POLICIES
from aegaeon.scheduler.ranks import Ranks, room_of
from aegaeon.sim.cluster import simulate
from aegaeon.sim.fleets import make_fleet
from aegaeon.sim.workloads import Arrival
from tests.support.policies import LIVE, make_scheduler
from tests.support.specs import make_request

# A tenth of a second for a prompt, half a second for a load.
COST = ModelCost(8.0, 5e-4, 4096, (1e-3, 0.0, 0.0), (0.0, 0.0, 0.01))
SLOW = msgspec.structs.replace(COST, decode=(0.0, 0.0, 0.04))  # three are more than a device
TARGET = Target(10.0, 0.1)
ROOMY, NARROW = 80.0, 12.0  # GB: for all of them, and for one


def run(load, cost=COST, memory_gb=ROOMY, **priorities):
    """Serve `load` with these `priorities`; return the requests' TTFT by model."""

    def scheduler(*given):
        made = POLICIES["slack"].scheduler(*given)
        for model, priority in priorities.items():
            made.prioritise(model, priority)
        return made

    load = tuple(sorted(load))
    models = dict.fromkeys(sorted({arrival.model for arrival in load}), cost)
    policy = replace(POLICIES["slack"], scheduler=scheduler)
    costs = Costs(16.0, memory_gb, models, tuple(models))
    result = simulate(load, models, costs, policy, make_fleet("slack", 1, TARGET))
    assert all(len(one.token_times_s) == one.wanted_tokens for one in result.served)
    return {
        model: [
            time_to_first_token_s(one.arrival_s, one.token_times_s)
            for one in result.served
            if one.model == model
        ]
        for model in models
    }, result


def flood(model, count=1500, output_tokens=20):
    rng = random.Random(1)
    return [Arrival(rng.uniform(0, 100), model, 100, output_tokens) for _ in range(count)]


def now_and_then(model, every_s=4.0):
    return [Arrival(every_s * number, model, 100, 21) for number in range(1, 24)]


def kept(times):
    return sum(ttft_s <= TARGET.ttft_s for ttft_s in times) / len(times)


@pytest.mark.parametrize("memory_gb", [ROOMY, NARROW])
@pytest.mark.parametrize(
    ("priorities", "wanted"),
    [
        ({"b": "high"}, 1.0),
        pytest.param({"a": "low"}, 1.0, marks=pytest.mark.thorough),
        pytest.param({"a": "low", "b": "high"}, 1.0, marks=pytest.mark.thorough),
    ],
)
def test_a_flood_of_a_lower_one_does_not_make_a_higher_one_late(priorities, wanted, memory_gb):
    load = [*flood("a"), *now_and_then("b")]
    assert kept(run(load, memory_gb=memory_gb)[0]["b"]) < 0.6
    assert kept(run(load, memory_gb=memory_gb, **priorities)[0]["b"]) >= wanted


def test_where_all_can_be_done_a_lower_one_is_served_as_well():
    load = [*flood("a", 250), *flood("b", 250), *now_and_then("c")]
    times, _ = run(load, a="high", c="low")
    assert kept(times["c"]) == kept(times["a"]) == kept(times["b"]) == 1.0


def test_what_cannot_be_kept_up_with_is_a_lower_one():
    """Steps of three models take more time than there is: one has to wait."""

    def late(result, model):
        """Of its tokens, those after their time."""
        served = [one for one in result.served if one.model == model]
        dues = [[TARGET.due_s(one.arrival_s, k) for k in range(400)] for one in served]
        return sum(
            at_s > due_s
            for one, due in zip(served, dues, strict=True)
            for at_s, due_s in zip(one.token_times_s, due, strict=True)
        ) / (400 * len(served))

    load = [Arrival(0.1 * n, model, 100, 400) for n, model in enumerate("abcaabbcc")]
    for low in "abc":
        _, result = run(load, SLOW, **{low: "low"})
        others = set("abc") - {low}
        assert all(late(result, other) == 0.0 for other in others), low
        assert late(result, low) > 0.5


@pytest.mark.thorough
def test_a_lower_one_gets_a_step_now_and_then():
    """Once it has had none for six times its TTFT, though others go on asking for more."""
    load = [*flood("a", 3000), *now_and_then("b", every_s=1.0)]
    times, result = run(load, a="high", b="low")
    assert result.ended_s > 150.0
    assert kept(times["b"]) < 0.5
    steps = sorted(at_s for one in result.served if one.model == "b" for at_s in one.token_times_s)
    gaps = [later - earlier for earlier, later in itertools.pairwise([1.0, *steps])]
    assert max(gaps) < TARGET.ttft_s + 60.0 + 2.0


def test_the_default_decides_nothing_otherwise():
    load = [*flood("a"), *flood("b", 300), *now_and_then("c")]
    plain, named = run(load)[1], run(load, a="normal", b="normal", c="normal")[1]
    times = [[tuple(one.token_times_s) for one in result.served] for result in (plain, named)]
    assert times[0] == times[1]


def test_ranks_are_those_of_models_with_requests():
    active = {"low": 1}
    ranks = Ranks(active)
    assert not ranks.are_used
    ranks.set("low", "low")
    ranks.set("high", "high")
    assert ranks.are_used and ranks.below("low") == 0
    active["other"] = 1
    ranks.changed()
    assert (ranks.below("low"), ranks.below("other")) == (1, 0)
    active["high"] = 1
    ranks.changed()
    assert [ranks.below(model) for model in ("low", "other", "high")] == [2, 1, 0]
    for model in ("low", "high"):
        ranks.set(model, "normal")
    assert not ranks.are_used and ranks.below("low") == 0


def test_room_to_wait_ends_earlier_for_lower_ones():
    assert [room_of(64, level, (0, 1, 2)) for level in (0, 1, 2)] == [48, 56, 64]
    assert room_of(64, 1, (1, 1)) == room_of(64, 0, ()) == 64
    assert room_of(1, 0, (0, 2)) == 1


@pytest.mark.parametrize("policy", LIVE)
def test_the_last_places_at_an_instance_are_for_higher_ones_and_for_other_keys(policy):
    def fill(model, key=""):
        for number in range(100):
            try:
                scheduler.submit(make_request(f"{model}{key}{number}", model, key=key), 0.0)
            except Overloaded as error:
                return number, str(error)
        raise AssertionError("there is no end")

    scheduler = make_scheduler(policy, {"a": 1, "b": 1}, 4, max_waiting=32)
    scheduler.prioritise("a", "low")
    assert fill("a") == (28, fill("a")[1]) and "higher priority" in fill("a")[1]
    assert fill("b")[0] == 4
    scheduler = make_scheduler(policy, {"a": 1, "b": 1}, 4, max_waiting=32)
    count, why = fill("a", "greedy")
    assert count == 28 and "other keys" in why
    assert fill("a", "modest")[0] == 3 and fill("a", "third")[0] == 1

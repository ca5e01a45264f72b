"""Keys share a device: the count of what each has had, and what comes of it in whole runs."""

import random

import pytest

from aegaeon.metrics import Target, time_to_first_token_s
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.fairness import MAX_REMEMBERED, Shares
from aegaeon.scheduler.policies import POLICIES
from aegaeon.sim.cluster import simulate
from aegaeon.sim.fleets import make_fleet
from aegaeon.sim.workloads import Arrival

# A tenth of a second for a prompt: a hundred waiting requests are a TTFT.
COST = ModelCost(8.0, 5e-4, 4096, (1e-3, 0.0, 0.0), (0.0, 0.0, 0.01))
COSTS = Costs(16.0, 80.0, dict.fromkeys("abc", COST), ("a",))


def run(load):
    load = tuple(sorted(load))
    models = {arrival.model: COST for arrival in load}
    fleet = make_fleet("slack", 1, Target(10.0, 0.1))
    return simulate(load, models, COSTS, POLICIES["slack"], fleet)


def ttfts(result, tokens):
    return [
        time_to_first_token_s(one.arrival_s, one.token_times_s)
        for one in result.served
        if one.wanted_tokens == tokens
    ]


def flood(model="a", key="greedy", count=1000):
    return [Arrival(0.001 * n, model, 100, 5, key) for n in range(count)]


def test_one_key_alone_is_charged_nothing():
    shares = Shares()
    shares.enter("r", "a", 1.0)
    shares.charge(["r"], 5.0)
    assert not shares.is_shared
    assert shares.ahead_s("r") == 0.0
    assert shares.worth(["r"]) == 1.0


def test_who_computes_is_ahead_by_its_weight():
    shares = Shares()
    shares.enter("r", "a", 1.0)
    shares.enter("s", "b", 4.0)
    shares.charge(["r", "s"], 2.0)
    assert shares.ahead_s("r") == pytest.approx(0.75)
    assert shares.ahead_s("s") == 0.0


def test_who_comes_is_owed_nothing_for_before_and_keeps_its_debt():
    shares = Shares()
    shares.enter("r", "a", 1.0)
    shares.enter("s", "b", 1.0)
    shares.charge(["r"], 3.0)
    shares.leave("r")
    shares.enter("t", "c", 1.0)
    assert shares.ahead_s("t") == 0.0
    shares.enter("u", "a", 1.0)
    assert shares.ahead_s("u") == pytest.approx(3.0)


def test_keys_that_are_gone_take_bounded_memory():
    shares = Shares()
    for number in range(3 * MAX_REMEMBERED):
        shares.enter("r", f"key-{number}", 1.0)
        shares.leave("r")
    assert len(shares._keys.gone) == MAX_REMEMBERED
    assert not shares._keys.known and not shares._asker_of


def test_all_requests_of_a_key_together_count_as_its_weight():
    shares = Shares()
    for number in range(9):
        shares.enter(f"r{number}", "a", 1.0)
    shares.enter("s", "b", 1.0)
    assert shares.worth(["s"]) == pytest.approx(5.0)
    assert shares.worth([f"r{n}" for n in range(9)]) == pytest.approx(5 / 9)
    assert shares.worth([]) == 1.0


@pytest.mark.parametrize("model", ["a", "b"])
def test_a_flood_of_one_key_does_not_make_another_wait(model):
    times_s = (5.0, 20.0, 40.0, 60.0)
    result = run([*flood(), *(Arrival(at_s, model, 100, 6, "modest") for at_s in times_s)])
    assert max(ttfts(result, tokens=6)) < 10.0
    assert result.ended_s > 90.0  # the flood went on all the time


@pytest.mark.thorough
def test_nor_does_one_that_goes_on():
    """Twice as much as the device can do, of one model; another one is asked now and then."""

    def kept(key):
        rng = random.Random(1)
        floods = key and "greedy"
        many = [Arrival(rng.uniform(0, 120), "a", 100, 40, floods) for _ in range(2000)]
        few = [Arrival(3.0 * number, "b", 100, 41, key) for number in range(40)]
        return sum(ttft_s < 10.0 for ttft_s in ttfts(run([*many, *few]), tokens=41))

    assert kept("modest") == 40
    assert kept("greedy") == 40  # its models share what it has
    assert kept("") < 20  # who asks without a key is everybody and nobody


def test_both_are_served_whole_and_the_device_never_rests():
    modest = [Arrival(2.0 * n, "b", 100, 6, "modest") for n in range(20)]
    result = run([*flood(), *modest])
    assert all(len(one.token_times_s) == one.wanted_tokens for one in result.served)
    alone_s = run([*flood(), *(Arrival(2.0 * n, "b", 100, 6) for n in range(20))]).ended_s
    assert result.ended_s < 1.1 * alone_s


def test_a_heavier_key_gets_more():
    def half_done_s(weight):
        shares = Shares()
        shares.enter("r", "a", weight)
        shares.enter("s", "b", 1.0)
        had = {"r": 0.0, "s": 0.0}
        for _ in range(600):
            chosen = min(("r", "s"), key=shares.ahead_s)
            shares.charge([chosen], 0.1)
            had[chosen] += 0.1
        return had["r"] / had["s"]

    assert half_done_s(1.0) == pytest.approx(1.0, rel=0.02)
    assert half_done_s(3.0) == pytest.approx(3.0, rel=0.02)


def test_with_one_key_and_one_model_nothing_is_decided_otherwise():
    load = flood()
    named = run(load)
    plain = run([Arrival(one.at_s, one.model, 100, one.output_tokens) for one in load])
    times = [[tuple(one.token_times_s) for one in result.served] for result in (named, plain)]
    assert times[0] == times[1]


def test_models_share_what_their_key_has_and_no_more():
    shares = Shares()
    shares.enter("a", "one", 1.0, "a")
    shares.charge(["a"], 5.0)
    assert not shares.is_shared
    shares.enter("b", "one", 1.0, "b")
    assert shares.is_shared and shares.ahead_s("a") == shares.ahead_s("b") == 0.0
    shares.charge(["a"], 3.0)
    assert (shares.ahead_s("a"), shares.ahead_s("b")) == (3.0, 0.0)
    assert shares.is_owed("b", 2.0) and not shares.is_owed("a", 2.0)
    # What the models of a key have had is its own: half of the device is the other one's.
    shares.enter("x", "two", 1.0, "a")
    assert shares.ahead_s("x") == 0.0
    shares.charge(["x"], 4.0)
    assert shares.ahead_s("x") == 4.0 and shares.is_owed("b", 3.5)
    assert shares.worth(["x"]) == pytest.approx(1.5)
    assert shares.worth(["a"]) == shares.worth(["b"]) == pytest.approx(0.75)
    for request in "abx":
        shares.leave(request)
    assert not shares.is_shared and shares._split == 0


def test_a_model_that_comes_back_keeps_its_debt_and_one_without_a_key_has_none():
    shares = Shares()
    shares.enter("a", "one", 1.0, "a")
    shares.enter("b", "one", 1.0, "b")
    shares.charge(["a"], 3.0)
    shares.leave("a")
    assert not shares.is_shared
    shares.enter("again", "one", 1.0, "a")
    assert shares.ahead_s("again") == 3.0
    nobody = Shares()
    nobody.enter("a", "", 1.0, "a")
    nobody.enter("b", "", 1.0, "b")
    assert not nobody.is_shared

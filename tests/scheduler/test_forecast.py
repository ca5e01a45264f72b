"""When there is room again: by hand, against whole simulated runs, and told to those who wait."""

import heapq
import itertools
import random

import pytest

from aegaeon.metrics import Target
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.forecast import (
    LEAST_LEFT,
    LONGEST_S,
    MOST_PROMISED,
    Ahead,
    Line,
    Pace,
    Site,
    forecast,
)
from aegaeon.scheduler.policies import POLICIES
from aegaeon.sim.cluster import simulate
from aegaeon.sim.fleets import make_fleet
from aegaeon.sim.workloads import Arrival

# A prefill takes 1 s for 100 tokens, a step 0.02 s, a load 2 s.
COST = ModelCost(8.0, 5e-4, 4096, (1e-2, 0.0, 1e-9), (0.0, 0.0, 0.02))
COSTS = Costs(4.0, 80.0, dict.fromkeys("ab", COST), ("a",))
BOTH = frozenset("ab")


def waiting(model="a", key="", tokens=100, left=10.0):
    return Ahead(key, model, tokens, left, has_begun=False)


def running(model="a", left=10.0, key=""):
    return Ahead(key, model, 100, left, has_begun=True)


def look(*sites, most=64, tbt_s=0.1, **rules):
    rules = {"max_batch": 16, "max_running": 32, **rules}
    return forecast(sites, Pace(COSTS, tbt_s=tbt_s, **rules), most)


def times(events):
    return [one.after_s for one in events]


def test_they_begin_one_behind_the_other_beside_who_decodes():
    found = look(Site([waiting(), waiting(), waiting()], BOTH))
    # The first alone; then a step of 0.02 s each 0.1 s is another one's.
    assert times(found.begins) == pytest.approx([1.0, 1.0 + 1.25, 1.0 + 2.5])


def test_a_model_that_is_not_there_is_loaded_once():
    found = look(Site([waiting(), waiting()], frozenset("b")), tbt_s=1e3)
    assert times(found.begins) == pytest.approx([3.0, 4.0], rel=1e-3)
    busy = look(Site([running("b", 1000.0), waiting()], frozenset("b")), tbt_s=1e3)
    assert times(busy.begins) == pytest.approx([3.0], rel=1e-3)


def test_where_no_more_may_run_the_first_to_end_makes_room():
    site = Site([running(left=50.0), running(left=20.0), waiting()], BOTH)
    found = look(site, max_running=2)
    assert times(found.begins) == pytest.approx([20 * 0.02 + 1.25])
    assert times(found.ends)[0] == pytest.approx(20 * 0.02)
    other = Site([running(left=50.0), running(left=20.0), waiting("b")], BOTH)
    assert times(look(other, max_running=2).begins) == pytest.approx([1.25])


def test_steps_of_many_and_of_many_models_take_longer():
    def end(*site, **rules):
        return times(look(Site(site, BOTH), **rules).ends)[0]

    assert end(running()) == pytest.approx(10 * 0.02)
    assert end(running(), running()) == pytest.approx(10 * 0.02)
    assert end(running(), running(), max_batch=1) == pytest.approx(10 * 0.04)
    assert end(running(), running("b")) == pytest.approx(10 * 0.04)
    full = look(Site([running(left=1e4) for _ in range(8)] + [waiting()], BOTH), max_batch=1)
    assert times(full.begins) == pytest.approx([1.0 / LEAST_LEFT])


def test_a_device_that_is_slower_than_its_costs_takes_longer():
    found = look(Site([running(), waiting()], BOTH, pace=2.0), tbt_s=1e9)
    assert times(found.begins) == pytest.approx([2.0])
    assert look(Site([running()], BOTH, pace=3.0)).ends[0].after_s == pytest.approx(0.6)


def test_instances_work_side_by_side_and_keys_are_told_apart():
    one, two = Site([waiting(key="x")] * 2, BOTH), Site([waiting(key="y", tokens=150)], BOTH)
    found = look(one, two)
    assert [event.key for event in found.begins] == ["x", "y", "x"]
    assert times(found.begins)[:2] == pytest.approx([1.0, 1.5])


def test_unknown_models_are_left_out_and_no_site_is_no_forecast():
    assert look().begins == look(Site([waiting("zzz"), running("zzz")], BOTH)).begins == ()


def test_what_is_looked_at_is_bounded():
    site = Site([running()] * 100 + [waiting(tokens=1)] * 500, BOTH)
    found = look(site, most=10, max_running=1000)
    assert len(found.begins) == 10 and len(found.ends) <= 120


@pytest.mark.parametrize("memory_gb", [80.0, 12.0])
@pytest.mark.parametrize("output_tokens", [5, 60])
def test_the_policy_needs_about_so_long(output_tokens, memory_gb):
    """A burst for two models, in turn: when each of them begins, by prediction and in a run."""
    load = [Arrival(0.0, "ab"[n % 2], 20, output_tokens) for n in range(40)]
    costs = Costs(16.0, memory_gb, COSTS.models, ("a",))
    models = dict.fromkeys("ab", COST)
    fleet = make_fleet("slack", 1, Target(10.0, 0.1))
    result = simulate(tuple(load), models, costs, POLICIES["slack"], fleet)
    real = sorted(one.token_times_s[0] for one in result.served)
    asked = [waiting(one.model, tokens=20, left=float(output_tokens)) for one in load]
    limits = fleet.limits
    pace = Pace(costs, limits.max_batch, limits.max_running, 0.1)
    found = times(forecast([Site(asked, frozenset())], pace, 40).begins)
    assert len(found) == 40
    for place in (9, 19, 29, 39):
        assert found[place] / 2 <= real[place] <= found[place] * 2, (place, found, real)


def test_each_that_is_refused_is_told_of_a_place_of_its_own():
    line = Line()
    free_s = [100.4, 101.7, 101.8, 105.0]
    assert [line.promise(free_s, 0, 100.0) for _ in range(4)] == [1.0, 2.0, 2.0, 5.0]
    # Beyond those that are known, it goes on as it went: four in five seconds.
    assert [line.promise(free_s, 0, 100.0) for _ in range(2)] == [7.0, 8.0]
    assert not line.is_over(100.0)
    # Those whose time has come are in, or have gone.
    assert line.promise([104.0, 104.5, 106.0, 110.2], 0, 103.0) == 8.0
    assert line.is_over(120.0) and line.promise([120.1], 0, 120.0) == 1.0


def test_a_place_is_kept_for_a_while_before_somebody_comes():
    line = Line()
    for _ in range(2):
        line.promise([13.2, 13.7], 0, 10.0)  # both are told to come at 14
    assert [line.kept(at_s) for at_s in (10.1, 11.9, 12.0)] == [0, 0, 2]
    assert not line.redeem(13.9) and line.redeem(14.0) and line.kept(14.0) == 1
    assert line.kept(14.4) == 1 and line.kept(14.6) == 0 and not line.redeem(14.6)


def test_who_was_told_earlier_has_the_first_places_and_those_that_are_free():
    line = Line()
    assert line.promise([10.2], 0, 10.0) == 1.0
    assert line.promise([12.0, 14.5], 0, 10.5) == 4.0
    assert line.promise([12.0, 14.5], 2, 10.5) == 2.0
    assert Line().promise([12.0, 14.5], 0, 10.5) == 2.0


def test_where_nothing_is_known_they_come_one_a_second():
    line = Line()
    assert [line.promise([], 0, 5.0) for _ in range(3)] == [1.0, 2.0, 3.0]
    assert [line.promise([1.0, 4.9], 0, 9.0)] == [1.0]


def test_promises_are_bounded_in_time_and_number():
    line = Line()
    waits = [line.promise([1000.5], 0, 1000.0) for _ in range(3 * MOST_PROMISED)]
    assert waits == sorted(waits) and waits[-1] == LONGEST_S
    assert len(line._promised) == MOST_PROMISED
    assert line.kept(1000.6) == 4  # at half a second each
    assert line.is_over(1000.0 + LONGEST_S + 1.0)


def come_again(room, runs, clients, seed, seconds=600.0):
    """Clients that ask again at once when served, and when told when refused; one ends each
    second, where all `runs` are taken. Return of those who came when told the part that got
    in, and how busy the device was."""
    rng, line, events = random.Random(seed), Line(), []
    waiting = running = came = entered = ended = 0
    for number in range(clients):
        heapq.heappush(events, (0.05 * number, number, "ask", False))
    serial = itertools.count(clients)
    while events[0][0] < seconds:
        now, _, kind, was_told = heapq.heappop(events)
        if kind == "end":
            ended, running = ended + 1, running - 1
            heapq.heappush(events, (now + 0.001, next(serial), "ask", False))
        else:
            is_due, free = line.redeem(now), room - waiting
            is_in = free > 0 and (is_due or free > min(line.kept(now), room * 3 // 4 + 1))
            came, entered = came + was_told, entered + (was_told and is_in)
            waiting += is_in
            if not is_in:
                wait_s = line.promise([now + 0.9 * (n + 1) for n in range(waiting)], free, now)
                heapq.heappush(events, (now + wait_s + 0.02, next(serial), "ask", True))
        while waiting and running < runs:
            waiting, running = waiting - 1, running + 1
            took_s = rng.uniform(0.5, 1.5) * runs
            heapq.heappush(events, (now + took_s, next(serial), "end", False))
    return entered / came, ended / seconds


@pytest.mark.parametrize("room", [2, 8])
def test_most_who_come_when_told_get_in_and_the_device_stays_busy(room):
    """Though predictions are a tenth too early, and answers take as they happen to."""
    for seed in range(3):
        got_in, busy = come_again(room, runs=4, clients=room + 10, seed=seed)
        assert got_in > 0.7 and busy > 0.95

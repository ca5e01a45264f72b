"""Turns of a few steps, where switching between models costs next to nothing."""

import math

import msgspec
import pytest

from aegaeon.metrics import Target, time_to_first_token_s, times_between_tokens_s
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.policies import POLICIES
from aegaeon.scheduler.rotation import WORTH, Newcomer, Rotation, Stream
from aegaeon.scheduler.urgency import SlackGroup
from aegaeon.sim.cluster import simulate
from aegaeon.sim.fleets import make_fleet
from aegaeon.sim.workloads import Arrival

STEP_S = 0.01
COST = ModelCost(1.0, 5e-6, 4096, (1e-3, 0.0, STEP_S), (0.0, 0.0, STEP_S))
COSTS = Costs(16.0, 80.0, dict.fromkeys("abcd", COST), ("a",), switch_s=1e-4)


def run(*arrivals, switch_s=1e-4, tbt_s=0.1):
    """All models fit, and are here from the start; requests are (time, model, prompt, answer)."""
    known = [(0.0, model, 8, 1) for model in sorted({model for _, model, _, _ in arrivals})]
    load = tuple(sorted(Arrival(*one) for one in (*known, *arrivals)))
    costs = msgspec.structs.replace(COSTS, switch_s=switch_s)
    models = {one.model: COST for one in load}
    fleet = make_fleet("slack", 1, Target(10.0, tbt_s))
    result = simulate(load, models, costs, POLICIES["slack"], fleet)
    return result, [one for one in result.served if one.arrival_s > 0]


def longest_gap_s(one):
    return max(times_between_tokens_s(one.token_times_s))


def test_streams_of_models_that_are_here_stand_still_for_a_step_of_each_other_one():
    _, served = run(
        *((5.0 + at_s, model, 8, 300) for at_s, model in zip((0, 2, 3), "abc", strict=True))
    )
    assert all(len(one.token_times_s) == 300 for one in served)
    assert max(map(longest_gap_s, served)) < 5 * STEP_S


def test_a_turn_is_as_long_as_makes_its_switch_small():
    result, served = run(*((5.0, model, 8, 300) for model in "ab"), switch_s=1e-3)
    longest_s = max(map(longest_gap_s, served))
    assert WORTH * 1e-3 <= longest_s < 2 * WORTH * 1e-3 + 3 * STEP_S
    assert sum(one.switch_s for one in result.usage) < 0.05 * sum(
        one.compute_s for one in result.usage
    )


def test_where_switching_takes_long_a_turn_makes_tokens_ahead_as_ever():
    result, served = run(*((5.0, model, 8, 300) for model in "ab"), switch_s=5e-3)
    assert max(map(longest_gap_s, served)) > 1.0
    assert sum(one.switches for one in result.usage) < 12


def test_a_newcomer_begins_as_soon_as_its_prefill_makes_nobody_late():
    _, served = run((5.0, "a", 8, 300), (5.5, "b", 200, 50), (6.5, "c", 400, 50))
    for one in served:
        assert longest_gap_s(one) < 0.05 + 4 * STEP_S  # a piece of 32 tokens, not a prompt of 400
        assert time_to_first_token_s(one.arrival_s, one.token_times_s) < 0.85
        first_s = one.token_times_s[0]
        assert all(at_s <= first_s + k * 0.1 for k, at_s in enumerate(one.token_times_s))


def test_newcomers_at_once_come_one_by_one_with_steps_of_the_others_between():
    _, served = run((5.0, "a", 8, 300), *((7.0, model, 100, 50) for model in "bbccd"))
    stream = next(one for one in served if one.model == "a")
    assert longest_gap_s(stream) < 0.12
    waits = [time_to_first_token_s(one.arrival_s, one.token_times_s) for one in served]
    assert max(waits) < 1.5


def test_a_device_that_cannot_keep_up_serves_those_it_can_by_turns_of_many_steps():
    result, served = run(*((5.0, model, 8, 300) for model in "ab"), tbt_s=1.6 * STEP_S)
    assert all(len(one.token_times_s) == 300 for one in served)
    assert sum(one.switches for one in result.usage) < 100


# The rotation by itself


def make_rotation(switch_s=0.0, now=0.0):
    rotation = Rotation()
    rotation.switched(switch_s, now)
    return rotation


def stream(model, lead_s=1.0, ran_s=0.0):
    group = SlackGroup(model, cost=COST, target=Target(), ran_s=ran_s, step_s=STEP_S)
    group.running["r"] = None
    return Stream(group, lead_s)


def newcomer(model="n", prefill_s=0.2, slack_s=9.0, group=None):
    group = group or SlackGroup(model, cost=COST, target=Target())
    return Newcomer(group, ("new",), prefill_s, slack_s)


def test_who_has_waited_longest_is_next():
    streams = [stream("a", ran_s=3.0), stream("b", ran_s=1.0), stream("c", ran_s=2.0)]
    assert make_rotation().next(None, streams, None, 4.0).group.model == "b"


def test_but_who_would_be_late_after_another_turn_comes_first():
    streams = [stream("a", ran_s=3.0, lead_s=0.03), stream("b", ran_s=1.0)]
    assert make_rotation().next(None, streams, None, 4.0).group.model == "b"
    assert make_rotation(1e-3).next(None, streams, None, 4.0).group.model == "a"


def test_a_turn_goes_on_until_it_was_worth_its_switch():
    rotation = make_rotation(1e-3, now=4.0)
    first, second = stream("a", ran_s=4.01), stream("b", ran_s=1.0)
    assert rotation.next(first.group, [first, second], None, 4.02).group is first.group
    assert rotation.next(first.group, [first, second], None, 4.03).group is second.group


def test_a_prefill_waits_until_it_makes_nobody_late():
    streams = [stream("a", ran_s=3.0, lead_s=0.2), stream("b", ran_s=2.0)]
    turn = make_rotation().next(None, streams, newcomer(), 4.0)
    assert turn.group.model == "b" and not turn.prefill and turn.lead_s == math.inf
    assert make_rotation().next(None, streams, newcomer(prefill_s=0.15), 4.0).prefill == ("new",)


def test_the_one_it_waits_for_says_how_far_ahead_it_must_be():
    streams = [stream("a", ran_s=3.0, lead_s=0.2)]
    assert make_rotation().next(None, streams, newcomer(), 4.0).lead_s == pytest.approx(0.21)


def test_nor_longer_than_until_it_is_more_urgent_itself():
    streams = [stream("a", ran_s=3.0, lead_s=0.2)]
    assert make_rotation().next(None, streams, newcomer(slack_s=0.2), 4.0).prefill == ("new",)


def test_between_two_prefills_everybody_gets_a_step():
    rotation = make_rotation()
    rotation.prefilled(3.5)
    streams = [stream("a", ran_s=3.6), stream("b", ran_s=2.0)]
    assert rotation.next(None, streams, newcomer(), 4.0).group.model == "b"
    streams = [stream("a", ran_s=3.6), stream("b", ran_s=4.0)]
    assert rotation.next(None, streams, newcomer(), 4.0).prefill


def test_with_the_device_it_is_prefilled_whatever_has_changed_meanwhile():
    rotation, new = make_rotation(1e-3, now=4.0), newcomer()
    late = stream("a", lead_s=0.01)
    assert rotation.next(new.group, [late], new, 4.0).prefill == ("new",)
    assert rotation.next(new.group, [], new, 9.0).prefill == ("new",)


def test_what_a_switch_takes_is_learned_and_delays_by_others_are_not_believed():
    rotation = Rotation()
    assert rotation.turn_s == math.inf
    rotation.switched(0.04, 0.0)
    for _ in range(10):
        rotation.switched(2e-3, 0.0)
    assert rotation.turn_s == pytest.approx(WORTH * 2e-3, rel=0.1)
    rotation.switched(0.5, 0.0)
    assert rotation.turn_s < WORTH * 3e-3
    for _ in range(80):
        rotation.switched(0.5, 0.0)
    assert rotation.turn_s == pytest.approx(WORTH * 0.5, rel=0.1)
    quick = make_rotation(0.0)
    for _ in range(40):
        quick.switched(1e-3, 0.0)
    assert quick.turn_s == pytest.approx(WORTH * 1e-3, rel=0.1)

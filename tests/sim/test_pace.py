"""Runs in closed form are what single steps would give, to the last bit."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.scheduler.cost import ModelCost
from aegaeon.sim.pace import QUANTUM, Pace, StepCosts, exact
from aegaeon.types import Stretch

starts = st.floats(0, 7200).map(exact)
steps_s = st.floats(1e-4, 0.5).map(exact)
growths_s = st.one_of(st.just(0.0), st.floats(0, 1e-3).map(exact))
paces = st.builds(Pace, starts, steps_s, growths_s)
MOST = 300


def ends_of(pace, steps=MOST):
    """When each step ends, by adding one step after another."""
    now, step_s, ends = pace.start_s, pace.step_s, []
    for _ in range(steps):
        now += step_s
        step_s += pace.growth_s
        ends.append(now)
    return ends


@given(paces)
def test_steps_end_when_single_steps_would(pace):
    assert [pace.end_s(n) for n in range(1, MOST + 1)] == ends_of(pace)


@given(paces, st.integers(1, MOST), st.data())
def test_a_run_in_two_parts_is_the_run(pace, cut, data):
    later = Pace(pace.end_s(cut), pace.step_s + cut * pace.growth_s, pace.growth_s)
    more = data.draw(st.integers(1, MOST))
    assert later.end_s(more) == pace.end_s(cut + more)


@given(paces, st.integers(-1, MOST), st.data())
def test_steps_before_a_time_are_those_that_end_before_it(pace, most, data):
    ends = ends_of(pace)
    at_s = data.draw(
        st.one_of(st.sampled_from(ends), st.floats(pace.start_s - 1, ends[-1] + 1).map(exact))
    )
    assert pace.steps_before(at_s, most) == sum(end_s < at_s for end_s in ends[: max(most, 0)])


@st.composite
def stretches(draw, pace):
    ends = ends_of(pace)
    near = st.one_of(st.sampled_from(ends), st.floats(pace.start_s - 1, ends[-1] + 1))
    tbt_s = draw(st.floats(1e-3, 1.0))
    return Stretch(
        steps=draw(st.integers(0, 2 * MOST)),
        until_s=draw(st.one_of(st.just(math.inf), near)),
        lead_s=draw(st.one_of(st.just(math.inf), st.floats(0.0, 20.0))),
        first_s=draw(st.floats(-5, 5)) + pace.start_s,
        made=draw(st.integers(0, 100)),
        tbt_s=tbt_s,
    )


@given(paces, st.integers(1, MOST), st.data())
def test_a_stretch_is_over_after_the_step_after_which_it_says_so(pace, most, data):
    stretch = data.draw(stretches(pace))
    ends = ends_of(pace, most)
    one_by_one = next(
        (n for n, end_s in enumerate(ends, 1) if stretch.is_over(n, end_s)),
        most,
    )
    assert pace.steps_of(stretch, most) == one_by_one


def test_a_lead_that_hardly_grows_is_not_walked_to():
    """It is there after 3e14 steps, give or take some 1e7 by rounding."""
    pace = Pace(5623.629304984646, 0.25962476683343993, 0.0)
    stretch = Stretch(
        steps=600, lead_s=17.4888653993206, first_s=5622.039815350244, made=33,
        tbt_s=0.25962476683347385,
    )  # fmt: skip
    assert pace.steps_of(stretch, MOST) == MOST


@given(st.floats(0, 3600))
def test_durations_are_whole_quanta(seconds):
    rounded = exact(seconds)
    assert abs(rounded - seconds) <= QUANTUM / 2
    assert rounded / QUANTUM == int(rounded / QUANTUM)


def test_a_step_takes_what_the_costs_say():
    cost = ModelCost(1, 1e-4, 4096, (0, 0, 0.1), (1e-6, 1e-4, 0.01))
    pace = StepCosts(cost).pace(2.0, context_tokens=1000, requests=4)
    assert pace.end_s(1) - 2.0 == pytest.approx(cost.decode_s(1000, 4), abs=1e-8)
    assert pace.end_s(2) - pace.end_s(1) == pytest.approx(cost.decode_s(1004, 4), abs=1e-8)


def test_a_fit_that_falls_with_the_context_does_not_run_backwards():
    cost = ModelCost(1, 1e-4, 4096, (0, 0, 0.1), (-1e-3, 1e-4, 0.01))
    pace = StepCosts(cost).pace(0.0, context_tokens=100_000, requests=2)
    assert pace.growth_s == 0.0 and pace.step_s > 0.01

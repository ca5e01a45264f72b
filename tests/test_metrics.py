"""The definitions of TTFT, TBT, percentiles and attainment."""

import statistics

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.metrics import (
    Attainment,
    Served,
    Summary,
    Target,
    TokenRuns,
    attainment,
    fairness,
    goodput,
    keeps,
    percentile,
    summarize,
    switch_time_share,
    time_share,
    time_to_first_token_s,
    times_between_tokens_s,
    tokens_in_time,
)

SAMPLES = st.lists(st.floats(0, 1e6), min_size=1, max_size=50)


@given(SAMPLES, st.floats(0, 100))
def test_percentiles_are_those_of_numpy(samples, percent):
    expected = float(numpy.percentile(samples, percent))
    assert percentile(sorted(samples), percent) == pytest.approx(expected, abs=1e-6)


@given(SAMPLES)
def test_percentiles_are_ordered_and_within_the_samples(samples):
    summary = summarize(samples)
    assert min(samples) <= summary.p50 <= summary.p90 <= summary.p99 <= max(samples)
    assert summary.avg == pytest.approx(statistics.fmean(samples))


def test_no_samples_have_no_summary():
    assert summarize([]) == Summary(None, None, None, None)


def test_ttft_counts_from_arrival():
    assert time_to_first_token_s(2.0, [5.0, 6.0]) == 3.0
    assert time_to_first_token_s(2.0, []) is None


def test_tbt_are_the_gaps_and_tokens_that_come_together_are_0_apart():
    assert times_between_tokens_s([1.0, 1.5, 1.5, 3.0]) == (0.5, 0.0, 1.5)
    assert times_between_tokens_s([1.0]) == ()
    assert times_between_tokens_s([]) == ()


TARGET = Target(ttft_s=10.0, tbt_s=0.1)


def served(*times, arrival=0.0, wanted=None, failed=False):
    return Served("a", arrival, times, len(times) if wanted is None else wanted, failed)


def published_share(gaps, ttft, tbt):
    """The artifact's loop, as PAPER.md writes it down."""
    start = acc = total = ok = 0.0
    due = ttft
    for gap in gaps:
        total += gap
        if total - start <= due:
            acc = due
            due += tbt
        else:
            ok += acc
            start = total
            acc = 0.0
            due += tbt
    ok += min(due, sum(gaps) - start)
    return ok / sum(gaps)


@given(st.lists(st.floats(0.001, 30), min_size=1, max_size=40), st.floats(0, 1000))
def test_the_share_of_time_is_that_of_the_published_loop(gaps, arrival):
    times = [arrival + sum(gaps[: count + 1]) for count in range(len(gaps))]
    share = time_share(served(*times, arrival=arrival), TARGET)
    assert share == pytest.approx(published_share(gaps, 10.0, 0.1), abs=1e-6)
    assert share <= 1 + 1e-9


def test_a_request_in_time_attains_everything():
    one = served(*(5 + 0.05 * token for token in range(100)))
    assert attainment([one], TARGET) == Attainment(1.0, 1.0, 1.0)


def test_tokens_are_due_from_arrival_and_early_ones_are_worth_something():
    # The first is ahead by 8 s, which the second may spend; the mean gap is too long all the same.
    one = served(2.0, 10.05, 10.3)
    assert attainment([one], TARGET).token == pytest.approx(2 / 3)
    assert not keeps(one, TARGET)
    assert TARGET.due_s(3.0, 5) == pytest.approx(13.5)


def test_the_mean_gap_counts_and_not_the_longest():
    assert keeps(served(1.0, 1.01, 1.2), TARGET)
    assert not keeps(served(1.0, 1.01, 1.21), TARGET)
    assert keeps(served(10.0), TARGET)
    assert not keeps(served(10.01), TARGET)


@pytest.mark.parametrize(
    "lost", [served(wanted=3), served(1.0, 1.1, wanted=3), served(1.0, 1.1, 1.2, failed=True)]
)
def test_a_request_that_did_not_get_its_tokens_is_a_miss_in_every_metric(lost):
    assert attainment([lost], TARGET) == Attainment(0.0, 0.0, 0.0)
    both = attainment([lost, served(1.0)], TARGET)
    assert both == Attainment(0.5, 0.25, 0.5)


def test_no_requests_miss_nothing():
    assert attainment([], TARGET) == Attainment(1.0, 1.0, 1.0)


def test_goodput_is_where_attainment_falls_below_the_line():
    assert goodput([(16, 1.0), (64, 0.95), (80, 0.85)]) == pytest.approx(72)
    assert goodput([(80, 0.95), (16, 1.0)]) == 80
    assert goodput([(16, 0.5)]) is None
    # A dip that is made up for again does not end it.
    assert goodput([(1, 1.0), (2, 0.8), (3, 0.92)]) == 3


def test_fairness_is_jains_index():
    assert fairness([0.7, 0.7, 0.7]) == pytest.approx(1)
    assert fairness([1, 0, 0, 0]) == pytest.approx(0.25)
    assert fairness([]) == fairness([0, 0]) == 1


def test_switching_takes_its_share_of_all_devices_time():
    assert switch_time_share(3.0, devices=2, elapsed_s=10.0) == pytest.approx(0.15)
    assert switch_time_share(0.0, devices=0, elapsed_s=0.0) == 0


runs_of_tokens = st.lists(
    st.tuples(st.floats(0, 3), st.floats(0.001, 0.2), st.floats(0, 1e-3), st.integers(1, 40)),
    min_size=1,
    max_size=5,
)


@given(runs_of_tokens, st.floats(0.05, 10), st.floats(0.01, 0.3))
def test_tokens_in_runs_are_judged_like_tokens_one_by_one(runs, ttft_s, tbt_s):
    times = TokenRuns()
    now = 0.0
    for pause_s, step_s, growth_s, tokens in runs:
        times.add(now + pause_s, step_s, growth_s, tokens)
        now = times[-1]
    plain = tuple(times)
    assert len(plain) == len(times) and plain == tuple(times[k] for k in range(len(times)))
    assert times[1:3] == list(plain[1:3])
    target = Target(ttft_s, tbt_s)
    one = Served("m", 0.0, times, len(times))
    other = Served("m", 0.0, plain, len(times))
    assert tokens_in_time(one, target) == tokens_in_time(other, target)
    assert time_share(one, target) == pytest.approx(time_share(other, target))
    assert keeps(one, target) == keeps(other, target)

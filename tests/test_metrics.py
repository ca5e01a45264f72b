"""The definitions of TTFT, TBT and percentiles."""

import statistics

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.metrics import (
    Summary,
    percentile,
    summarize,
    time_to_first_token_s,
    times_between_tokens_s,
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

"""Counts, their sums, and what is read from them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.errors import RegionMismatch
from aegaeon.figures import (
    BUCKETS_S,
    Histogram,
    InstanceFigures,
    ModelFigures,
    ProxyFigures,
    decode_figures,
    encode_figures,
    folded_up,
    summed_up,
    within,
)
from aegaeon.metrics import Target

SAMPLES = st.lists(st.floats(0.0, 200.0), max_size=50)


def histogram_of(samples):
    histogram = Histogram()
    for sample in samples:
        histogram.note(sample)
    return histogram


@given(SAMPLES)
def test_a_bucket_holds_what_is_at_most_its_bound(samples):
    histogram = histogram_of(samples)
    for index, bound in enumerate(BUCKETS_S):
        assert sum(histogram.counts[: index + 1]) == sum(sample <= bound for sample in samples)
    assert histogram.count == len(samples)
    assert histogram.sum_s == pytest.approx(sum(samples))


@given(SAMPLES, SAMPLES)
def test_histograms_add_up_and_differ(one, other):
    whole = histogram_of(one)
    whole.add(histogram_of(other))
    assert whole.counts == histogram_of(one + other).counts
    assert whole.minus(histogram_of(one)).counts == histogram_of(other).counts


@given(st.lists(st.floats(0.0, 120.0), min_size=1, max_size=50), st.floats(0.01, 1.0))
def test_a_quantile_is_in_the_bucket_of_the_sample_it_stands_for(samples, share):
    found = histogram_of(samples).quantile_s(share)
    count = max(1, -(-len(samples) * share // 1))
    exact = sorted(samples)[min(len(samples), int(count)) - 1]
    low = max((bound for bound in (0.0, *BUCKETS_S) if bound < exact), default=0.0)
    high = min(bound for bound in BUCKETS_S if bound >= exact)
    assert low <= found <= high


def test_nothing_has_no_quantile_and_what_is_above_all_bounds_counts_as_the_highest():
    assert Histogram().quantile_s(0.5) is None
    assert histogram_of([500.0]).quantile_s(0.5) == BUCKETS_S[-1]


def test_figures_come_back_as_they_were():
    proxy = ProxyFigures(starts=2, responses={"/x": {"200": 3}}, hung=1, dropped={"x": 4})
    proxy.of("a").ttft.note(0.3)
    proxy.of("a").failed["overloaded"] = 2
    instance = InstanceFigures(cached=("a",), kv_bytes=7)
    instance.of("a").evictions["host"] = {"room": 1}
    for figures in (proxy, instance):
        assert decode_figures(encode_figures(figures)) == figures
    with pytest.raises(RegionMismatch, match="one version"):
        decode_figures(b"\xc1")


def test_the_sum_of_proxies_counts_each_once_and_changes_none():
    one, other = ProxyFigures(), ProxyFigures(responses={"/x": {"200": 1}})
    one.dropped, other.dropped, other.traces, other.hung = {"y": 2}, {"x": 1}, {"lost": 3}, 1
    for proxy, wait_s in ((one, 1.0), (other, 3.0)):
        figures = proxy.of("a")
        figures.ttft.note(wait_s)
        figures.finished["stop"] = 2
        figures.generated_tokens, figures.open, figures.oldest_wait_s = 10, 1, wait_s
    other.of("b").cancelled = 1
    before = [encode_figures(proxy) for proxy in (one, other)]
    sums = summed_up((one, other, other))
    assert [encode_figures(proxy) for proxy in (one, other)] == before
    a = sums.models["a"]
    assert (a.ttft.count, a.finished, a.generated_tokens, a.open) == (3, {"stop": 6}, 30, 3)
    assert a.oldest_wait_s == 3.0 and sums.models["b"].cancelled == 2
    assert sums.responses == {"/x": {"200": 2}}
    assert (sums.dropped, sums.traces) == ({"y": 2, "x": 2}, {"lost": 6})
    assert sums.proxies_hung == 2


def test_what_ended_proxies_have_counted_is_kept():
    ended = ProxyFigures(responses={"/x": {"200": 1}}, dropped={"x": 1}, traces={"sent": 2}, hung=3)
    gone = folded_up(folded_up(None, "a", ended), "b", ended)
    assert (gone.responses, gone.dropped) == ({"/x": {"200": 2}}, {"x": 2})
    assert (gone.traces, gone.hung, gone.folded) == ({"sent": 4}, 6, ("a", "b"))


def test_every_sum_of_a_model_is_added():
    """A field that is forgotten in `add` would be lost where there are several proxies."""
    figures = ModelFigures()
    for name in figures.__struct_fields__:
        value = getattr(figures, name)
        if isinstance(value, Histogram):
            value.note(1.0)
        elif isinstance(value, dict):
            value["x"] = 1
        else:
            setattr(figures, name, 1)
    whole = ModelFigures()
    whole.add(figures)
    assert whole == figures


@pytest.mark.parametrize(
    ("ttft_s", "tbt_s", "kept"),
    [(10, 0.1, "both"), (10, 0.2, "ttft"), (11, 0.1, "tbt"), (11, 0.2, "neither")],
)
def test_a_request_keeps_one_target_both_or_none(ttft_s, tbt_s, kept):
    assert within(ttft_s, tbt_s, Target(10, 0.1)) == kept

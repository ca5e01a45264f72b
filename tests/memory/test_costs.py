"""Whether KV is copied or prefilled again: by what both have been seen to take."""

import pytest

from aegaeon.memory.costs import SHARE, SwapCosts
from aegaeon.memory.traffic import Traffic

MB = 1 << 20


@pytest.fixture
def traffic():
    """A link that moved 2 MB in 2 s, out and in."""
    traffic = Traffic()
    traffic.add("kv_out", MB, 0.5)
    traffic.add("kv_in", MB, 1.5)
    traffic.add("weights", MB, 100.0)  # says nothing about KV
    return traffic


def test_the_quicker_of_both_is_chosen(traffic):
    costs = SwapCosts(traffic)
    costs.note_prefill("a", tokens=100, took_s=1.0)
    assert costs.is_worth_copying("a", tokens=401, moved_bytes=4 * MB)
    assert not costs.is_worth_copying("a", tokens=399, moved_bytes=4 * MB)


def test_what_has_not_been_measured_counts_as_quick(traffic):
    assert SwapCosts(traffic).is_worth_copying("a", 1, 100 * MB)
    costs = SwapCosts(Traffic())
    costs.note_prefill("a", tokens=100, took_s=0.1)
    assert costs.is_worth_copying("a", 1, 100 * MB)
    costs = SwapCosts(traffic)
    costs.note_prefill("b", tokens=100, took_s=0.1)
    costs.note_prefill("a", tokens=0, took_s=9.0)
    assert costs.is_worth_copying("a", 1, 100 * MB)


def test_a_new_measurement_moves_the_mean_by_its_share(traffic):
    costs = SwapCosts(traffic)
    costs.note_prefill("a", tokens=100, took_s=1.0)
    costs.note_prefill("a", tokens=100, took_s=5.0)
    token_s = 0.01 + SHARE * 0.04
    assert costs.is_worth_copying("a", 1000, int(1001 * token_s * MB)) is False
    assert costs.is_worth_copying("a", 1000, int(999 * token_s * MB))

"""Sampling against plain float64 formulas, and by statistics against the exact distribution."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon.engine.sampling import candidates, pick_token, uniform
from aegaeon.types import SamplingParams

LOGITS = np.random.default_rng(0).normal(size=200).astype(np.float32) * 3


def exact(logits, params: SamplingParams) -> dict[int, float]:
    """The distribution, written as slowly and plainly as possible."""
    scaled = {i: float(x) / params.temperature for i, x in enumerate(logits)}
    if 0 < params.top_k < len(scaled):
        kth = sorted(scaled.values(), reverse=True)[params.top_k - 1]
        scaled = {i: x for i, x in scaled.items() if x >= kth}
    high = max(scaled.values())
    weights = {i: math.exp(x - high) for i, x in scaled.items()}
    total = math.fsum(weights.values())
    probabilities = {i: w / total for i, w in weights.items()}
    kept, mass = {}, 0.0
    for i, p in sorted(probabilities.items(), key=lambda item: (-item[1], item[0])):
        if kept and mass >= params.top_p:
            break
        kept[i] = p
        mass += p
    if params.top_p >= 1.0:
        kept = probabilities
    best = max(kept.values())
    kept = {i: p for i, p in kept.items() if p >= params.min_p * best}
    total = math.fsum(kept.values())
    return {i: p / total for i, p in kept.items()}


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=2.0, top_k=5),
    SamplingParams(top_p=0.7),
    SamplingParams(top_p=0.0),
    SamplingParams(min_p=0.2),
    SamplingParams(temperature=1.3, top_k=50, top_p=0.9, min_p=0.05),
    SamplingParams(top_k=1000),
]


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("size", [1, 7, 200])
def test_candidates_have_the_exact_distribution(params, size):
    ids, weights = candidates(LOGITS[:size], params)
    expected = exact(LOGITS[:size], params)
    assert ids.tolist() == sorted(expected)
    got = weights / weights.sum()
    assert np.allclose(got, [expected[i] for i in ids.tolist()], atol=1e-12)


@pytest.mark.parametrize("params", PARAMS)
def test_draws_follow_the_distribution(params):
    draws = 4000
    counts = np.zeros(len(LOGITS))
    for position in range(draws):
        counts[pick_token(LOGITS, params, position)] += 1
    expected = exact(LOGITS, params)
    assert set(np.flatnonzero(counts).tolist()) <= set(expected)
    for token, p in expected.items():
        # Six standard deviations: the draws are fixed, so this passes or fails for good.
        assert abs(counts[token] - draws * p) <= 6 * math.sqrt(draws * p) + 3


def test_greedy_takes_the_lowest_id_of_the_highest_logit():
    logits = np.array([0.0, 3.0, 1.0, 3.0], dtype=np.float32)
    assert pick_token(logits, SamplingParams(temperature=0.0, seed=5), 9) == 1


def test_a_flat_vocabulary_larger_than_the_sorted_head_keeps_its_nucleus():
    logits = np.linspace(0, 0.01, 5000, dtype=np.float32)
    ids, _ = candidates(logits, SamplingParams(top_p=0.5))
    assert ids.tolist() == sorted(exact(logits, SamplingParams(top_p=0.5)))


@settings(max_examples=100)
@given(st.integers(-(1 << 63), (1 << 64) - 1), st.integers(0, 1 << 20))
def test_a_draw_belongs_to_its_seed_and_position(seed, position):
    draw = uniform(seed, position)
    assert 0.0 <= draw < 1.0
    assert draw == uniform(seed, position)
    assert draw != uniform(seed, position + 1)
    assert draw != uniform(seed + 1, position)


def test_tiny_temperatures_do_not_overflow():
    assert pick_token(LOGITS, SamplingParams(temperature=1e-30), 0) == int(LOGITS.argmax())

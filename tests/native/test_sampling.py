"""Sampling against numpy's reference and its Philox, the reference against plain formulas, and
log-probabilities against float64."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aegaeon import _native
from aegaeon.types import SamplingParams
from tests.support.sampling import SEED_MASK, candidates, pick_token, uniform

POOL = _native.ThreadPool(2)
LOGITS = np.random.default_rng(0).normal(size=200).astype(np.float32) * 3
QWEN3_VOCAB = 151_936
VOCABULARIES = (1, 2, 17, 64, 65, 511, 1000, 5000)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    try:
        _native.force_isa(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    _native.force_isa("best")


def native(rows, draws) -> list[int | None]:
    """The tokens of rows [rows, vocab], each drawn by its (SamplingParams, position)."""
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    operands = [
        (p.temperature, p.top_k, p.top_p, p.min_p, p.seed & SEED_MASK, position)
        for p, position in draws
    ]
    return _native.sample(POOL, rows.ctypes.data, rows.shape, operands)


def pick(logits, params, position) -> int | None:
    return native(logits[None], [(params, position)])[0]


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
def test_the_references_candidates_have_the_exact_distribution(params, size):
    ids, weights = candidates(LOGITS[:size], params)
    expected = exact(LOGITS[:size], params)
    assert ids.tolist() == sorted(expected)
    got = weights / weights.sum()
    assert np.allclose(got, [expected[i] for i in ids.tolist()], atol=1e-12)


@pytest.mark.parametrize("params", PARAMS)
def test_draws_follow_the_distribution(params):
    draws = 4000
    tokens = native(np.tile(LOGITS, (draws, 1)), [(params, at) for at in range(draws)])
    counts = np.bincount(np.array(tokens), minlength=len(LOGITS))
    expected = exact(LOGITS, params)
    assert set(np.flatnonzero(counts).tolist()) <= set(expected)
    for token, p in expected.items():
        # Six standard deviations: the draws are fixed, so this passes or fails for good.
        assert abs(counts[token] - draws * p) <= 6 * math.sqrt(draws * p) + 3


def rows_of_all_kinds(vocab: int, seed: int) -> np.ndarray:
    """Rows as models make them, flat ones, steep ones, and ones full of ties."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(6, vocab))
    rows = [
        *(noise[0], noise[1] * 3, noise[2] * 20),
        *(np.round(noise[3] * 2) / 2, np.zeros(vocab), np.linspace(0, 0.01, vocab)),
        *(noise[4] * 1e30, noise[5] * 1e-30 - 7e4),
        np.where(np.arange(vocab) % 97 == 96, 30.0, np.round(noise[3])),
    ]
    return np.array(rows).astype(np.float32)


def every_params(vocab: int, rng) -> SamplingParams:
    return SamplingParams(
        temperature=float(rng.choice([0.01, 0.3, 0.7, 1.0, 1.3, 5.0])),
        top_k=int(rng.choice([0, 0, 1, 2, 40, 3000, max(vocab - 1, 0), vocab])),
        top_p=float(rng.choice([1.0, 0.999, 0.9, 0.5, 0.1, 0.0])),
        min_p=float(rng.choice([0.0, 0.0, 0.05, 0.9, 1.0])),
        seed=int(rng.integers(1 << 63)),
    )


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_tokens_are_those_of_the_reference(isa, vocab):
    rng = np.random.default_rng(vocab)
    for seed in range(6):
        rows = rows_of_all_kinds(vocab, seed)
        for _ in range(12):
            draws = [(every_params(vocab, rng), int(rng.integers(1 << 20))) for _ in rows]
            expected = [pick_token(row, *draw) for row, draw in zip(rows, draws, strict=True)]
            assert native(rows, draws) == expected, draws


@pytest.mark.parametrize("top_k", [0, 1, 40, 20_000, QWEN3_VOCAB])
def test_tokens_of_a_large_vocabulary_are_those_of_the_reference(isa, top_k):
    rows = rows_of_all_kinds(QWEN3_VOCAB, top_k)
    for position, top_p in enumerate((1.0, 0.9, 0.1)):
        params = SamplingParams(temperature=0.8, top_k=top_k, top_p=top_p, seed=7)
        draws = [(params, position)] * len(rows)
        expected = [pick_token(row, params, position) for row in rows]
        assert native(rows, draws) == expected


def test_a_row_is_drawn_alike_in_any_company():
    rng = np.random.default_rng(5)
    rows = np.tile(rows_of_all_kinds(1000, 5), (4, 1))
    draws = [(every_params(1000, rng), at) for at in range(len(rows))]
    alone = [pick(row, *draw) for row, draw in zip(rows, draws, strict=True)]
    assert native(rows, draws) == alone
    assert native(rows[::-1], draws[::-1]) == alone[::-1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 63, 64, 129])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_has_no_token_and_spoils_no_other(isa, bad, at, temperature):
    rows = np.tile(LOGITS[:130], (3, 1))
    rows[1, at] = bad
    draws = [(SamplingParams(temperature=temperature, top_p=0.9), 0)] * 3
    tokens = native(rows, draws)
    assert tokens[1] is None
    assert tokens[0] == tokens[2] == pick_token(rows[0], *draws[0])


@pytest.mark.parametrize("size", [1, 63, 64, 65, 200, 5000])
def test_greedy_takes_the_lowest_id_of_the_highest_logit(isa, size):
    rng = np.random.default_rng(size)
    rows = np.round(rng.normal(size=(20, size)) * 2).astype(np.float32)
    draws = [(SamplingParams(temperature=0.0, seed=5, top_k=3), 9)] * len(rows)
    assert native(rows, draws) == rows.argmax(axis=1).tolist()


def test_zeros_of_either_sign_are_a_tie():
    rows = np.array([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0]], dtype=np.float32)
    assert native(rows, [(SamplingParams(temperature=0.0), 0)] * 2) == [1, 1]


def test_tiny_temperatures_do_not_overflow(isa):
    for temperature in (1e-30, 1e-308, 5e-324):
        assert pick(LOGITS, SamplingParams(temperature=temperature), 0) == int(LOGITS.argmax())


@settings(max_examples=300)
@given(st.integers(0, SEED_MASK), st.integers(0, SEED_MASK))
@example(0, 0)
@example(SEED_MASK, SEED_MASK)
def test_a_draw_is_numpys_philox_of_seed_and_position(seed, position):
    draw = uniform(seed, position)
    assert _native.uniform(seed, position) == draw
    # Of equal weights the draw chooses its share.
    flat = np.zeros((1, 1000), dtype=np.float32)
    operands = [(1.0, 0, 1.0, 0.0, seed, position)]
    assert _native.sample(POOL, flat.ctypes.data, flat.shape, operands) == [int(draw * 1000)]


def test_seeds_beyond_64_bits_wrap_around():
    assert uniform(-1, 3) == uniform(SEED_MASK, 3)
    assert 0.0 <= uniform(5, 3) < 1.0
    assert uniform(5, 3) != uniform(5, 4) and uniform(5, 3) != uniform(6, 3)


def log_softmax(row: np.ndarray) -> np.ndarray:
    wide = row.astype(np.float64) - float(row.max())
    return wide - math.log(math.fsum(np.exp(wide)))


@pytest.mark.parametrize("vocab", [*VOCABULARIES, QWEN3_VOCAB])
@pytest.mark.parametrize("best", [0, 1, 5, 20, 3000])
def test_log_probabilities_are_the_float64_formula(isa, vocab, best):
    rows = rows_of_all_kinds(vocab, best)
    chosen = np.random.default_rng(best).integers(vocab, size=len(rows)).tolist()
    found = _native.log_probabilities(POOL, rows.ctypes.data, rows.shape, chosen, best)
    for row, token, result in zip(rows, chosen, found, strict=True):
        expected = log_softmax(row)
        value, likeliest = result
        assert math.isclose(value, expected[token], rel_tol=1e-12, abs_tol=1e-11)
        ids = np.argsort(-row, kind="stable")[:best].tolist()
        assert [id for id, _ in likeliest] == ids
        got = [value for _, value in likeliest]
        assert np.allclose(got, expected[ids], rtol=1e-12, atol=1e-11)


def test_instruction_sets_that_fuse_make_the_same_bits():
    rows = rows_of_all_kinds(5000, 1)
    chosen = list(range(len(rows)))
    found = []
    for name in ("avx2", "avx512"):
        try:
            _native.force_isa(name)
        except ValueError:
            pytest.skip(f"this processor has no {name}")
        found.append(_native.log_probabilities(POOL, rows.ctypes.data, rows.shape, chosen, 9))
        _native.force_isa("best")
    assert found[0] == found[1]


def test_log_probabilities_of_what_is_not_finite_are_none():
    rows = np.tile(LOGITS, (3, 1))
    rows[1, 150] = math.nan
    found = _native.log_probabilities(POOL, rows.ctypes.data, rows.shape, [0, 1, 2], 2)
    assert found[1] is None and found[0] is not None and found[2] is not None


def test_what_does_not_fit_together_is_refused():
    address = LOGITS.ctypes.data
    draw = (1.0, 0, 1.0, 0.0, 0, 0)
    with pytest.raises(ValueError, match="2 tokens are asked of 1 rows"):
        _native.sample(POOL, address, (1, 200), [draw, draw])
    with pytest.raises(ValueError, match="1 to 2\\^32 - 1 tokens"):
        _native.sample(POOL, address, (1, 0), [draw])
    with pytest.raises(ValueError, match="1 tokens are asked of 0 rows"):
        _native.log_probabilities(POOL, address, (0, 200), [1], 1)
    with pytest.raises(IndexError, match="token id 200 is outside the vocabulary of 200"):
        _native.log_probabilities(POOL, address, (1, 200), [200], 1)
    assert _native.sample(POOL, address, (0, 200), []) == []

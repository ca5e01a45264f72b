"""What is done to logits before a draw, against the formula in float64: penalties, bias, masks."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon import _native
from aegaeon.sampling import SamplingParams
from tests.native.test_sampling import every_params, rows_of_all_kinds
from tests.support.sampling import SEED_MASK, adjust, pick_allowed, pick_token

POOL = _native.ThreadPool(2)
FLAT = SamplingParams(temperature=1.0)


def adjustment(params: SamplingParams, prompt=(), made=()) -> _native.Adjustment:
    penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
    built = _native.Adjustment(penalties, list(params.logit_bias), list(prompt))
    for token in made:
        built.count(token)
    return built


def mask_of(allowed) -> np.ndarray:
    bits = np.zeros(-(-len(allowed) // 32) * 32, dtype=np.uint8)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view(np.uint32)


def native(rows, draws, changes) -> list[int | None]:
    """The tokens of rows, each drawn after its (Adjustment or None, mask or None)."""
    operands = [
        (p.temperature, p.top_k, p.top_p, p.min_p, p.seed & SEED_MASK, position)
        for p, position in draws
    ]
    given = [(one, 0 if mask is None else mask.ctypes.data) for one, mask in changes]
    return _native.sample(POOL, rows.ctypes.data, rows.shape, operands, given)


PENALTIES = [
    SamplingParams(presence_penalty=1.5),
    SamplingParams(frequency_penalty=-0.7),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(repetition_penalty=0.5, presence_penalty=-2.0, frequency_penalty=2.0),
    SamplingParams(logit_bias=((3, 100.0), (5, -100.0), (3, 0.25))),
    SamplingParams(repetition_penalty=1e-300, frequency_penalty=0.1),
]


@pytest.mark.parametrize("kind", range(len(PENALTIES)))
@pytest.mark.parametrize("vocab", [7, 65, 1000])
def test_adjusted_rows_are_drawn_as_the_formula_says(kind, vocab):
    rng = np.random.default_rng(vocab + kind)
    rows = rows_of_all_kinds(vocab, kind)
    penalty, draws, changes, expected = PENALTIES[kind], [], [], []
    for row in rows:
        prompt, made = (rng.integers(vocab, size=size).tolist() for size in (9, 12))
        params, position = every_params(vocab, rng), int(rng.integers(1 << 20))
        draws.append((params, position))
        changes.append((adjustment(penalty, prompt, made), None))
        expected.append(pick_token(adjust(row, penalty, prompt, made), params, position))
    assert native(rows, draws, changes) == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from([1, 2, 31, 32, 33, 300]))
def test_masked_rows_are_drawn_as_if_they_had_no_other_tokens(seed, vocab):
    rng = np.random.default_rng(seed)
    rows = rows_of_all_kinds(vocab, seed)
    share = float(rng.choice([0.02, 0.5, 1.0]))
    allowed = [rng.random(vocab) < share for _ in rows]
    masks = [mask_of(row) for row in allowed]
    draws = [(every_params(vocab, rng), at) for at in range(len(rows))]
    expected = [
        pick_allowed(row, *draw, may) for row, draw, may in zip(rows, draws, allowed, strict=True)
    ]
    assert native(rows, draws, [(None, mask) for mask in masks]) == expected


def test_masks_and_penalties_go_together():
    rows = rows_of_all_kinds(300, 3)
    allowed = np.arange(300) % 7 == 0
    params = SamplingParams(frequency_penalty=1.0, logit_bias=((7, 3.0), (8, 90.0)))
    made = [0, 7, 7, 8, 14]
    draws = [(SamplingParams(temperature=0.8, top_p=0.9, seed=1), at) for at in range(len(rows))]
    changes = [(adjustment(params, (), made), mask_of(allowed))] * len(rows)
    expected = [
        pick_allowed(adjust(row, params, [], made), *draw, allowed)
        for row, draw in zip(rows, draws, strict=True)
    ]
    assert native(rows, draws, changes) == expected


def test_changes_of_a_row_show_in_no_other():
    rows = rows_of_all_kinds(500, 4)
    draws = [(SamplingParams(temperature=0.9, seed=2), at) for at in range(len(rows))]
    plain = native(rows, draws, [])
    before = rows.copy()
    change = (
        adjustment(SamplingParams(repetition_penalty=1.8), range(400)),
        mask_of(np.arange(500) < 3),
    )
    mixed = native(rows, draws, [(None, None), change] * 4 + [(None, None)])
    assert mixed[::2] == plain[::2]
    assert all(token < 3 for token in mixed[1::2])
    assert (rows == before).all()


def test_an_adjustment_depends_on_its_tokens_in_no_order():
    rows, params = rows_of_all_kinds(100, 5), PENALTIES[3]
    draws = [(SamplingParams(seed=3), at) for at in range(len(rows))]
    made = [3, 9, 3, 50, 9, 9]
    there, back = adjustment(params, [1, 2, 9], made), adjustment(params, [9, 2, 1], made[::-1])
    assert native(rows, draws, [(there, None)] * len(rows)) == native(
        rows, draws, [(back, None)] * len(rows)
    )


def test_a_row_of_which_nothing_may_be_drawn_has_no_token():
    rows = rows_of_all_kinds(64, 6)[:2]
    nothing, all_of_it = mask_of([False] * 64), mask_of([True] * 64)
    for temperature in (0.0, 1.0):
        draws = [(SamplingParams(temperature=temperature), 0)] * 2
        tokens = native(rows, draws, [(None, nothing), (None, all_of_it)])
        assert tokens[0] is None and tokens[1] == pick_token(rows[1], *draws[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_whatever_is_allowed(bad):
    rows = rows_of_all_kinds(64, 7)[:1].copy()
    rows[0, 40] = bad
    change = adjustment(SamplingParams(logit_bias=((40, -100.0),))), mask_of(np.arange(64) < 3)
    assert native(rows, [(FLAT, 0)], [change]) == [None]


def test_tokens_beyond_the_vocabulary_change_nothing():
    rows = rows_of_all_kinds(40, 8)
    draws = [(SamplingParams(seed=9), at) for at in range(len(rows))]
    change = adjustment(SamplingParams(logit_bias=((40, 100.0), (10**9, 5.0)))), None
    assert native(rows, draws, [change] * len(rows)) == native(rows, draws, [])


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="over 0"):
        _native.Adjustment((0.0, 0.0, 0.0), [], [])
    rows = rows_of_all_kinds(40, 9)
    draws = [(FLAT, 0)] * len(rows)
    with pytest.raises(ValueError, match="1 changes are given for 9 rows"):
        native(rows, draws, [(None, None)])

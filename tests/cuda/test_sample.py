"""The sampling kernel, run on the CPU by the emulation: its tokens are the CPU's."""

import math

import numpy as np
import pytest
import torch

from aegaeon import _native
from aegaeon.types import SamplingParams
from tests.native.test_sampling import every_params, rows_of_all_kinds
from tests.support.emulated import call, set_schedule
from tests.support.sampling import SEED_MASK

POOL = _native.ThreadPool(1)
Draws = list[tuple[SamplingParams, int]]


@pytest.fixture(autouse=True)
def _in_order_afterwards():
    yield
    set_schedule(0, False)


def on_cpu(rows, draws: Draws) -> list[int | None]:
    operands = [
        (p.temperature, p.top_k, p.top_p, p.min_p, p.seed & SEED_MASK, position)
        for p, position in draws
    ]
    return _native.sample(POOL, rows.ctypes.data, rows.shape, operands)


def emulated(rows, draws: Draws, height: float = -1.0) -> list[int | None]:
    tokens = torch.full((len(rows),), 7777, dtype=torch.int64)
    numbers = torch.tensor(
        [(p.temperature, p.top_p, p.min_p, height) for p, _ in draws], dtype=torch.float64
    )
    choices = np.array([(p.top_k, p.seed & SEED_MASK, at) for p, at in draws], dtype=np.uint64)
    call("sample", torch.from_numpy(rows), *rows.shape, numbers, torch.from_numpy(choices), tokens)
    return [None if token < 0 else token for token in tokens.tolist()]


@pytest.mark.parametrize("vocab", [1, 2, 65, 511, 1300])
def test_tokens_are_the_cpus(vocab):
    rng = np.random.default_rng(vocab)
    for seed in range(3):
        set_schedule(seed, False)
        rows = rows_of_all_kinds(vocab, seed)
        for _ in range(2):
            draws = [(every_params(vocab, rng), int(rng.integers(1 << 20))) for _ in rows]
            assert emulated(rows, draws) == on_cpu(rows, draws), draws


def test_tokens_of_a_large_vocabulary_are_the_cpus():
    rows = rows_of_all_kinds(50_000, 1)[[1, 3, 4, 5]]
    for top_k, top_p in ((0, 0.9), (0, 0.1), (40, 0.95), (20_000, 0.5)):
        params = SamplingParams(temperature=0.8, top_k=top_k, top_p=top_p, seed=7)
        draws = [(params, at) for at in range(len(rows))]
        assert emulated(rows, draws) == on_cpu(rows, draws), (top_k, top_p)


def test_greedy_takes_the_lowest_id_of_the_highest_logit():
    rng = np.random.default_rng(3)
    rows = np.round(rng.normal(size=(40, 700)) * 2).astype(np.float32)
    rows[0, :3], rows[1, :3] = (9.0, -0.0, 0.0), (-9.0, 9.0, 9.0)
    draws = [(SamplingParams(temperature=0.0, seed=5, top_k=3), 9)] * len(rows)
    assert emulated(rows, draws) == rows.argmax(axis=1).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_has_no_token_and_spoils_no_other(bad, temperature):
    rows = np.tile(rows_of_all_kinds(600, 2)[0], (3, 1))
    rows[1, 555] = bad
    draws = [(SamplingParams(temperature=temperature, top_p=0.9), 0)] * 3
    tokens = emulated(rows, draws)
    assert tokens[1] is None
    assert [tokens[0], tokens[2]] == on_cpu(rows[[0, 2]], draws[:2])


def test_tiny_temperatures_and_shares_do_not_overflow():
    row = rows_of_all_kinds(600, 4)[:1]
    for temperature in (1e-30, 1e-308, 5e-324):
        for top_p in (1.0, 1 - 1e-16, 1e-300, 0.0):
            draws = [(SamplingParams(temperature=temperature, top_p=top_p), 0)]
            assert emulated(row, draws) == on_cpu(row, draws)


def test_a_draw_that_rounds_up_to_the_total_takes_the_last_token_that_is_kept():
    rows = np.zeros((1, 1300), dtype=np.float32)
    rows[0, 1200:] = -50.0
    for top_p, last in ((1.0, 1299), (0.5, 599)):
        draws = [(SamplingParams(top_p=top_p), 0)]
        assert emulated(rows, draws, 1.0) == [last]

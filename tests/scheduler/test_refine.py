"""Costs become what actions take: from a file, from a guess, through stalls and busy spells."""

import math
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.refine import Refiner, guessed_cost

TRUE = ModelCost(
    weight_gb=0.3, kv_gb_per_token=5e-5, max_len=2048, prefill=(2.5e-3, 4e-7, 0.02),
    decode=(1e-5, 3e-3, 0.012),
)  # fmt: skip
GUESS = guessed_cost(0.3, 5e-5, 2048)
# As published of a GPU: squares of lengths and contexts with negative slopes.
NEGATIVE = msgspec.structs.replace(
    TRUE, prefill=(2.7e-5, -6e-10, 0.008), decode=(-2.9e-7, 8e-5, 0.014)
)


def serve(refiner, truth, actions, seed=0, slower=1.0):
    """Do actions at random that take what `truth` says, 3 % more or less."""
    rng = random.Random(seed)
    for _ in range(actions):
        noise = slower * math.exp(rng.gauss(0, 0.03))
        if rng.random() < 0.2:
            lengths = [round(8 * 64 ** rng.random()) for _ in range(rng.randint(1, 4))]
            tokens, squares = sum(lengths), sum(length**2 for length in lengths)
            refiner.note_prefill(tokens, squares, noise * truth.prefill_s(tokens, squares))
        else:
            requests = rng.randint(1, 16)
            context = requests * rng.randint(16, 800)
            refiner.note_decode(context, requests, noise * truth.decode_s(context, requests))


def worst_error(cost, truth):
    """The largest relative error over all sizes."""
    pairs = [(cost.prefill_s(n), truth.prefill_s(n)) for n in (16, 64, 256, 500)]
    pairs += [
        (cost.decode_s(requests * length, requests), truth.decode_s(requests * length, requests))
        for requests in (1, 4, 16)
        for length in (32, 200, 700)
    ]
    return max(abs(predicted / taken - 1) for predicted, taken in pairs)


def test_it_begins_with_the_costs_it_was_given():
    assert Refiner(TRUE).cost == TRUE


@pytest.mark.parametrize("truth", [TRUE, NEGATIVE])
def test_a_guess_becomes_a_cost_model_within_a_few_tens_of_actions(truth):
    assert worst_error(GUESS, truth) > 0.5
    refiner = Refiner(GUESS, is_measured=False)
    serve(refiner, truth, 60)
    assert worst_error(refiner.cost, truth) < 0.25


@pytest.mark.parametrize("cost", [TRUE, NEGATIVE])
def test_measured_costs_stay_while_actions_take_what_they_say(cost):
    refiner = Refiner(cost)
    serve(refiner, cost, 200)
    assert worst_error(refiner.cost, cost) < 0.1


def test_a_machine_that_became_slower_is_believed_after_some_actions():
    refiner = Refiner(TRUE)
    serve(refiner, TRUE, 50)
    serve(refiner, TRUE, 30, seed=1, slower=2.0)
    assert TRUE.decode_s(1000, 8) * 1.7 < refiner.cost.decode_s(1000, 8)
    serve(refiner, TRUE, 30, seed=2)
    assert worst_error(refiner.cost, TRUE) < 0.3


def test_slow_steps_are_a_warning_of_slow_prefills():
    refiner = Refiner(TRUE)
    for _ in range(20):
        refiner.note_decode(1000, 8, 2 * TRUE.decode_s(1000, 8))
    assert refiner.cost.prefill_s(200) > 1.2 * TRUE.prefill_s(200)


@given(st.integers(0, 59), st.floats(10, 1e6))
def test_a_stall_is_not_believed(at, factor):
    refiner = Refiner(TRUE)
    serve(refiner, TRUE, at)
    before_s = refiner.cost.decode_s(2000, 8)
    refiner.note_decode(2000, 8, factor * before_s)
    assert before_s <= 1.01 * refiner.cost.decode_s(2000, 8) <= 1.6 * before_s
    serve(refiner, TRUE, 12, seed=1)
    assert worst_error(refiner.cost, TRUE) < 0.15


def test_loads_are_refined_by_what_they_were_said_to_take():
    costs = Costs(
        link_gb_per_s=2, device_memory_gb=8, models={"a": TRUE}, model_mix=("a",), load_fixed_s=0.01
    )
    refiner = Refiner(TRUE)
    for _ in range(12):
        refiner.note_load(costs.load_s(refiner.cost), 3 * costs.load_s(TRUE))
    assert costs.load_s(refiner.cost) == pytest.approx(3 * costs.load_s(TRUE), rel=0.05)
    assert refiner.cost.prefill == TRUE.prefill


def test_what_took_no_time_teaches_nothing():
    refiner = Refiner(TRUE)
    refiner.note_prefill(100, 10_000, 0.0)
    refiner.note_decode(100, 0, 1.0)
    refiner.note_load(1.0, 0.0)
    assert refiner.cost == TRUE


ACTIONS = st.tuples(
    st.sampled_from(("prefill", "decode")),
    st.integers(1, 100_000),
    st.integers(1, 64),
    st.floats(1e-6, 1e4),
)


@given(st.sampled_from((TRUE, NEGATIVE, GUESS)), st.booleans(), st.lists(ACTIONS, max_size=60))
def test_whatever_happens_the_costs_are_ones_that_a_file_could_say(cost, is_measured, actions):
    refiner = Refiner(cost, is_measured)
    for kind, tokens, requests, took_s in actions:
        if kind == "prefill":
            refiner.note_prefill(tokens, tokens * tokens // requests, took_s)
        else:
            refiner.note_decode(tokens, requests, took_s)
        refined = msgspec.to_builtins(refiner.cost)
        assert msgspec.convert(refined, ModelCost) == refiner.cost
        starts, now = (*cost.prefill, *cost.decode), (*refiner.cost.prefill, *refiner.cost.decode)
        assert all(map(math.isfinite, now))
        assert all(a * b >= 0 for a, b in zip(starts, now, strict=True)), "a slope turned round"

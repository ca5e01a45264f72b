"""Penalties, bias and log-probabilities of an engine's tokens, and how likely a prompt was."""

import random

import numpy as np
import pytest
import torch

from aegaeon.sampling import SamplingParams
from tests.support.decoder import VOCAB, load_tiny, make_engine, make_request
from tests.support.dense_device import DenseDevice, dense_batch
from tests.support.runner import Runner
from tests.support.sampling import adjust, pick_token

ALL = SamplingParams(temperature=0.8, seed=5, logprobs=VOCAB)
ADJUSTED = {
    "presence": SamplingParams(temperature=0.8, seed=5, presence_penalty=2.0),
    "frequency": SamplingParams(temperature=0.8, seed=5, frequency_penalty=-1.0),
    "bias": SamplingParams(temperature=0.8, seed=5, logit_bias=((3, 6.0), (4, -100.0))),
    "repetition": SamplingParams(temperature=0.0, repetition_penalty=1.6),
}


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(VOCAB), k=length)


def run(*requests, choose=None, **kinds) -> Runner:
    runner = Runner(make_engine(**kinds))
    runner.submit(*requests)
    runner.finish(choose)
    return runner


def logits_of(token_ids: list[int], model: str = "a") -> torch.Tensor:
    """What the reference makes of every position, [tokens, vocab]."""
    return load_tiny(model, DenseDevice()).forward(dense_batch(token_ids))


@pytest.mark.parametrize("kind", ADJUSTED)
def test_tokens_follow_the_formula_at_every_position(kind):
    params, given = ADJUSTED[kind], prompt(20)
    tokens = run(make_request("r", given, sampling=params, max_tokens=30)).tokens["r"]
    assert (
        tokens
        != run(
            make_request(
                "r", given, sampling=SamplingParams(temperature=params.temperature, seed=5)
            )
        ).tokens["r"]
    )
    logits = logits_of([*given, *tokens]).numpy()
    for at, token in enumerate(tokens):
        row = adjust(logits[len(given) + at - 1], params, given, tokens[:at])
        assert token == pick_token(row, params, at)


def adjusted_requests():
    return [
        make_request(f"{kind}{i}", prompt(9 + 40 * i, i), "ab"[i % 2], sampling=params)
        for i in range(3)
        for kind, params in ADJUSTED.items()
    ]


@pytest.mark.parametrize("device", ["cpu", "staged"])
def test_adjusted_tokens_are_the_same_in_any_company(device):
    alone = {r.id: run(r).tokens[r.id] for r in adjusted_requests()}
    together = run(*adjusted_requests(), choose=random.Random(3), device=device, threads=2)
    assert together.tokens == alone


@pytest.mark.parametrize("kind", ADJUSTED)
def test_a_request_that_goes_on_elsewhere_counts_what_it_had(kind):
    whole = make_request("r", prompt(20), sampling=ADJUSTED[kind], max_tokens=20)
    expected = run(whole).tokens["r"]
    rest = make_request(
        "r", prompt(20), sampling=ADJUSTED[kind], max_tokens=20,
        generated_token_ids=tuple(expected[:11]), attempt=1,
    )  # fmt: skip
    assert run(rest).tokens["r"] == expected[11:]


def test_log_probabilities_are_those_of_the_models_logits():
    params = SamplingParams(temperature=0.8, seed=5, presence_penalty=2.0, logprobs=4)
    given = prompt(33)
    runner = run(make_request("r", given, sampling=params), make_request("other", prompt(7)))
    tokens = runner.tokens["r"]
    expected = logits_of([*given, *tokens]).double().log_softmax(-1).numpy()
    for at, (token, told) in enumerate(zip(tokens, runner.log_probs["r"], strict=True)):
        row = expected[len(given) + at - 1]
        assert abs(told.log_prob - row[token]) < 1e-4
        assert [token for token, _ in told.best] == np.argsort(-row)[:4].tolist()
        assert np.allclose([value for _, value in told.best], np.sort(row)[::-1][:4], atol=1e-4)
    assert runner.log_probs["other"] == [None] * 12


def test_asking_changes_no_token():
    plain = run(make_request("r", prompt(70), sampling=SamplingParams(temperature=0.8, seed=5)))
    asked = SamplingParams(temperature=0.8, seed=5, logprobs=0, prompt_logprobs=2)
    told = run(make_request("r", prompt(70), sampling=asked))
    assert told.tokens == plain.tokens
    assert all(one.best == () for one in told.log_probs["r"])


@pytest.mark.parametrize("length", [1, 2, 32, 33, 34, 100])
def test_a_prompt_is_scored_from_its_second_token_on(length):
    given = prompt(length)
    params = SamplingParams(temperature=0.0, prompt_logprobs=3)
    scores = run(make_request("r", given, sampling=params)).scores["r"]
    expected = logits_of(given).double().log_softmax(-1).numpy()
    assert len(scores) == length - 1
    for at, told in enumerate(scores):
        assert abs(told.log_prob - expected[at][given[at + 1]]) < 1e-4
        assert [token for token, _ in told.best] == np.argsort(-expected[at])[:3].tolist()


def test_scores_are_the_same_bits_in_any_company():
    params = SamplingParams(temperature=0.0, prompt_logprobs=3)
    requests = [
        make_request(f"r{i}", prompt(50 * i + 3, i), "ab"[i % 2], sampling=params) for i in range(5)
    ]
    alone = {r.id: run(r).scores[r.id] for r in requests}
    mates = [make_request(f"m{i}", prompt(60, i), "ab"[i % 2]) for i in range(5)]
    together = run(*requests, *mates, choose=random.Random(1), kv_bytes=1 << 19, threads=2)
    assert {name: together.scores[name] for name in alone} == alone


def test_a_request_that_goes_on_behind_its_first_token_is_not_scored_again():
    params = SamplingParams(temperature=0.0, prompt_logprobs=3)
    rest = make_request("r", prompt(40), sampling=params, generated_token_ids=(3,), attempt=1)
    assert run(rest).scores["r"] == []


def test_a_nan_in_a_prompt_that_is_scored_fails_its_own_request_only():
    poisoned = 7

    def load(model, device):
        decoder = load_tiny(model, device)
        decoder.poison_token = poisoned
        return decoder

    params = SamplingParams(temperature=0.0, prompt_logprobs=1)
    clean = [token for token in prompt(150) if token != poisoned]
    spoilt = [*clean[:10], poisoned, *clean[:90]]
    runner = Runner(make_engine(loader=load))
    runner.submit(
        make_request("bad", spoilt, sampling=params), make_request("good", clean, sampling=params)
    )
    runner.finish()
    assert runner.failures == {"bad": "internal_error"}
    assert len(runner.scores["good"]) == len(clean) - 1
    assert runner.engine.usage().kv_bytes == 0

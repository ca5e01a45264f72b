"""Fields of requests that reach down to the logits, through a real server, by the openai client."""

import math

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from aegaeon.proxy.tokenizer import TextModel
from tests.support.server import Server
from tests.support.smollm2 import smollm2_directory

TEXTS = ("The quick brown fox jumps over the lazy dog.", "A device passes", "42")


@pytest.fixture(scope="module")
def server(checkpoints, tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server"), checkpoints) as it:
        yield it


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def log_probs_of_reference(directory, token_ids):
    """What transformers makes of each place, [tokens, vocab]."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("name", ["ada", "bob", "cleo"])
def test_likelihoods_are_those_of_transformers(client, checkpoints, name):
    prompts = [list(TextModel(str(checkpoints[name])).encode(text)) for text in TEXTS]
    answer = client.completions.create(
        model=name, prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
    )
    for choice, prompt in zip(answer.choices, prompts, strict=True):
        expected = log_probs_of_reference(checkpoints[name], prompt)
        told = choice.logprobs
        assert len(told.token_logprobs) == len(prompt) + 1 and told.token_logprobs[0] is None
        for at, token in enumerate(prompt[1:]):
            assert math.isclose(
                told.token_logprobs[at + 1], float(expected[at][token]), abs_tol=1e-3
            )
            best = max(told.top_logprobs[at + 1].values())
            assert math.isclose(best, float(expected[at].max()), abs_tol=1e-3)


def test_likelihoods_of_a_real_model_are_those_of_transformers(tmp_path):
    directory = smollm2_directory()
    prompt = list(TextModel(str(directory)).encode("The capital of France is Paris, and of Japan"))
    expected = log_probs_of_reference(directory, prompt)
    with (
        Server(tmp_path, {"smollm2": directory}) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        answer = client.completions.create(
            model="smollm2", prompt=[prompt], echo=True, logprobs=1, max_tokens=1, temperature=0
        )
    told = answer.choices[0].logprobs.token_logprobs
    for at, token in enumerate(prompt[1:]):
        assert math.isclose(told[at + 1], float(expected[at][token]), abs_tol=1e-3)


def test_a_bias_and_a_penalty_change_what_is_said(client, checkpoints):
    text = TextModel(str(checkpoints["ada"]))
    wanted = text.encode("a")[0]
    asked = {"model": "ada", "prompt": "the", "max_tokens": 12, "temperature": 0}
    biased = client.completions.create(**asked, logit_bias={str(wanted): 100}, logprobs=0)
    assert biased.choices[0].text == "a" * 12
    repeated = client.completions.create(
        **asked, logit_bias={str(wanted): 100}, logprobs=0, presence_penalty=2, frequency_penalty=2,
        extra_body={"repetition_penalty": 1e6},
    )  # fmt: skip
    assert (
        biased.choices[0].logprobs.token_logprobs[0]
        == (repeated.choices[0].logprobs.token_logprobs[0])
    )
    plain = client.completions.create(**asked)
    assert plain.choices[0].text != biased.choices[0].text


def test_a_chats_log_probabilities_are_those_of_its_tokens(client):
    chat = client.chat.completions.create(
        model="cleo", messages=[{"role": "user", "content": "hi"}], max_tokens=8, temperature=0,
        logprobs=True, top_logprobs=20, seed=3,
    )  # fmt: skip
    content = chat.choices[0].logprobs.content
    assert b"".join(bytes(one.bytes) for one in content).decode(errors="replace") == (
        chat.choices[0].message.content
    )
    for one in content:
        values = [top.logprob for top in one.top_logprobs]
        assert len(values) == 20 and values == sorted(values, reverse=True)
        assert one.logprob == values[0]  # greedy

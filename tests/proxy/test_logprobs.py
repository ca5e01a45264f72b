"""Log-probabilities as clients see them, in all four kinds of answer, and echoed prompts."""

import asyncio
import json
from pathlib import Path

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from aegaeon.proxy.asked import Prompt, max_tokens
from aegaeon.proxy.failures import ApiError
from tests.proxy.test_routes import CHAT, CHAT_PATH, TEXT_BODY, TEXT_PATH, ask, error_of, post
from tests.support.proxy_server import TEXT, Proxy, in_memory
from tests.support.specs import make_spec


@pytest.fixture
def proxy(tmp_path):
    return Proxy(tmp_path)


def stream(proxy, path, body):
    async def test():
        async with (
            in_memory(proxy) as client,
            client.stream("POST", path, json={**body, "stream": True}) as response,
        ):
            return [line[6:] async for line in response.aiter_lines() if line.startswith("data:")]

    frames = asyncio.run(asyncio.wait_for(test(), 60))
    assert frames.pop() == "[DONE]"
    return [json.loads(frame) for frame in frames]


def test_a_chat_names_each_token_its_bytes_and_the_likeliest(proxy):
    body = {**CHAT, "logprobs": True, "top_logprobs": 3}
    response = post(proxy, CHAT_PATH, body).json()
    choice = ChatCompletion.model_validate(response).choices[0]
    content = choice.logprobs.content
    assert len(content) == len(proxy.answer)
    assert b"".join(bytes(one.bytes) for one in content).decode() == TEXT
    assert all(one.token == bytes(one.bytes).decode(errors="replace") for one in content)
    assert {one.logprob for one in content} == {-0.25}
    assert [top.logprob for top in content[0].top_logprobs] == [-0.25, -1.25, -2.25]
    assert content[0].top_logprobs[0].token == content[0].token
    assert response["choices"][0]["logprobs"]["refusal"] is None


def test_a_streamed_chat_tells_the_same(proxy):
    body = {**CHAT, "logprobs": True, "top_logprobs": 2}
    whole = post(proxy, CHAT_PATH, body).json()["choices"][0]["logprobs"]["content"]
    chunks = stream(proxy, CHAT_PATH, body)
    told = []
    for chunk in chunks:
        checked = ChatCompletionChunk.model_validate(chunk).choices[0]
        if checked.logprobs is not None:
            assert checked.delta.content or checked.finish_reason
            told += chunk["choices"][0]["logprobs"]["content"]
    assert told == whole


def test_no_top_is_told_unasked(proxy):
    response = post(proxy, CHAT_PATH, {**CHAT, "logprobs": True}).json()
    assert response["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_a_completion_tells_lists_with_the_token_among_the_top(proxy):
    body = {**TEXT_BODY, "logprobs": 2}
    choice = Completion.model_validate(post(proxy, TEXT_PATH, body).json()).choices[0]
    told = choice.logprobs
    assert len(told.tokens) == len(proxy.answer)
    assert told.token_logprobs == [-0.25] * len(told.tokens)
    assert all(
        top[token] == -0.25 for token, top in zip(told.tokens, told.top_logprobs, strict=True)
    )
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert TEXT[offset : offset + len(token)] == token
    assert any(token.startswith("bytes:\\x") for token in told.tokens)


def test_a_streamed_completion_tells_the_same(proxy):
    # The first token of a prompt has null, as OpenAI has it; openai.types have no word for that.
    body = {**TEXT_BODY, "logprobs": 1, "echo": True}
    whole = post(proxy, TEXT_PATH, body).json()["choices"][0]
    told = {name: [] for name in whole["logprobs"]}
    text = ""
    for chunk in stream(proxy, TEXT_PATH, body):
        choice = chunk["choices"][0]
        text += choice["text"]
        for name in told if choice["logprobs"] else ():
            told[name] += choice["logprobs"][name]
    assert (text, told) == (whole["text"], whole["logprobs"])


def test_an_echo_needs_no_log_probabilities(proxy):
    choice = post(proxy, TEXT_PATH, {**TEXT_BODY, "echo": True}).json()["choices"][0]
    assert choice["text"] == "hello" + TEXT
    assert choice["logprobs"] is None


def test_likelihoods_of_batches_of_token_ids_as_lm_eval_asks_for_them(proxy):
    prompts = [list(proxy.text.encode("The quick brown fox")), list(proxy.text.encode("dog"))]
    body = {
        **{"model": "m", "prompt": prompts, "echo": True, "logprobs": 1},
        **{"max_tokens": 1, "temperature": 0, "seed": 1234},
    }
    answer = post(proxy, TEXT_PATH, body).json()
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        told = choice["logprobs"]
        assert len(told["tokens"]) == len(prompt) + 1
        assert told["token_logprobs"] == [None, *[-0.25] * len(prompt)]
        assert told["top_logprobs"][0] is None
        # What lm-eval looks at: the likeliest of each place, against the token there.
        for token, top in list(zip(told["tokens"], told["top_logprobs"], strict=True))[1:-1]:
            assert max(top, key=top.get) == token
    assert answer["choices"][1]["text"].startswith("dog")
    assert answer["usage"]["completion_tokens"] == 2


def test_a_prompt_alone_is_scored_without_generating(proxy):
    body = {**TEXT_BODY, "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = post(proxy, TEXT_PATH, body).json()
    choice = answer["choices"][0]
    count = len(proxy.text.encode("hello"))
    assert (choice["text"], choice["finish_reason"]) == ("hello", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, *[-0.25] * (count - 1)]
    assert answer["usage"]["completion_tokens"] == 0
    assert proxy.instance.submitted[0].max_tokens == 1


def test_what_changes_logits_reaches_the_instance(proxy):
    given = {"presence_penalty": 0.5, "frequency_penalty": -1.5, "repetition_penalty": 1.25}
    post(proxy, CHAT_PATH, {**CHAT, **given, "logit_bias": {"7": -100, "9": 2.5}})
    sampling = proxy.instance.submitted[0].sampling
    assert {name: getattr(sampling, name) for name in given} == given
    assert sampling.logit_bias == ((7, -100.0), (9, 2.5))
    assert sampling.logprobs is None and sampling.prompt_logprobs is None


def test_the_models_own_repetition_penalty_applies_unless_the_client_says_otherwise(proxy):
    file = Path(proxy.specs[0].path, "generation_config.json")
    file.write_text(json.dumps({"repetition_penalty": 1.05}))
    ask(proxy, *[("POST", CHAT_PATH, {"json": {**CHAT, **extra}}) for extra in (
        {}, {"repetition_penalty": 1.0}
    )])  # fmt: skip
    assert [one.sampling.repetition_penalty for one in proxy.instance.submitted] == [1.05, 1.0]


def test_a_token_that_the_model_does_not_have_cannot_be_echoed(proxy):
    error = error_of(post(proxy, TEXT_PATH, {"model": "m", "prompt": [1, 384], "echo": True}))
    assert (error["param"], error["code"]) == ("prompt", "invalid_value")


def test_scores_that_come_twice_or_too_late_are_told_once():
    """An instance dies over a prompt; the next one scores it from its beginning."""
    from aegaeon.proxy.generation import Generation, OpenRequest  # noqa: PLC0415
    from aegaeon.sampling import PromptScores, SamplingParams, TokenLogProbs  # noqa: PLC0415

    opened = OpenRequest(
        "r",
        Generation(model="m", prompt_token_ids=(1,), sampling=SamplingParams(), max_tokens=9),
        0.0,
        1e9,
    )
    told = [TokenLogProbs(-float(at)) for at in range(9)]
    opened.take_in(PromptScores("r", 0, 1, tuple(told[1:4])), 0.0)
    assert opened.take().scores == tuple(told[1:4])
    opened.lose()
    opened.take_in(PromptScores("r", 0, 4, tuple(told[4:6])), 0.0)
    assert opened.take() is None
    opened.take_in(PromptScores("r", 1, 1, tuple(told[1:3])), 0.0)
    opened.take_in(PromptScores("r", 1, 3, tuple(told[3:6])), 0.0)
    assert opened.take().scores == tuple(told[4:6])
    opened.take_in(PromptScores("r", 1, 7, tuple(told[7:])), 0.0)
    assert opened.attempt == 2


def test_a_prompt_that_is_all_the_context_can_be_scored():
    spec = make_spec("m", context_tokens=8)
    scored = Prompt((1,) * 8, 0, is_firm=True)
    assert max_tokens(spec, scored, "prompt") == 1  # which nobody gets
    assert max_tokens(spec, Prompt((1,) * 7, 1, is_firm=True), "prompt") == 1
    for tokens, asked in ((8, 1), (9, 0)):
        with pytest.raises(ApiError, match="the context of m is 8 tokens"):
            max_tokens(spec, Prompt((1,) * tokens, asked, is_firm=True), "prompt")

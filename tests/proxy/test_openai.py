"""Bodies as clients send them: what is taken, and what each mistake is called."""

import json

import pytest

from aegaeon.proxy.failures import ApiError
from aegaeon.proxy.openai import parse_chat, parse_completion

FUNCTION = [{"type": "function", "function": {"name": "f"}}]
OF_A_LIST = {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields):
    return parse_chat(json.dumps({"model": "m", "messages": HELLO, **fields}).encode())


def completion(**fields):
    return parse_completion(json.dumps({"model": "m", "prompt": "hello", **fields}).encode())


def test_null_means_not_given_for_every_optional_field():
    body = chat(**dict.fromkeys(("temperature", "stop", "n", "tools", "stream_options", "seed")))
    assert body.stops() == ()
    assert body.temperature is None


def test_unknown_fields_are_ignored():
    assert chat(made_up={"a": 1}, store=True).model == "m"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]"),
        ({"logit_bias": {"the": 1}}, "logit_bias"),
        ({"logit_bias": {"-5": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"00005": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0665": 1}}, "logit_bias"),
        ({"logit_bias": {"": 1}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"user": 7}, "user"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": FUNCTION * 2}, "tools"),
        ({"tools": [OF_A_LIST]}, "tools[0].function.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": FUNCTION, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": FUNCTION, "tool_choice": {"function": {"name": "g"}}}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object"}, "tools": FUNCTION}, "response_format"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [*HELLO, {"role": "user", "content": 5}]}, "messages[1].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
    ],
)
def test_a_wrong_value_is_named(fields, param):
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "invalid_value", param)
    assert param in error.message or param == "messages"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["audio"]}, "modalities"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
    ],
)
def test_a_feature_that_is_not_built_is_refused(fields, param):
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "unsupported_parameter", param)


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": False},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0},
        {"logit_bias": {}},
        {"tools": []},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}},
        {"tools": FUNCTION, "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": FUNCTION, "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"tools": FUNCTION, "tool_choice": "none", "response_format": {"type": "json_object"}},
        {"stream": True, "stream_options": {"include_usage": True}},
    ],
)
def test_features_that_are_off_may_be_spelled_out(fields):
    assert chat(**fields).model == "m"


def test_a_missing_field_is_named():
    with pytest.raises(ApiError) as caught:
        parse_chat(b'{"model": "m"}')
    assert caught.value.code == "missing_required_parameter"
    assert caught.value.param == "messages"


@pytest.mark.parametrize("raw", [b"", b"{", b'{"a": NaN}', b"\xff", b'{"x":' + b"[" * 60_000])
def test_what_is_not_json_is_called_so(raw):
    with pytest.raises(ApiError) as caught:
        parse_chat(raw)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_a_prompt_comes_in_four_forms(prompt, expected):
    assert completion(prompt=prompt).prompts() == expected


@pytest.mark.parametrize("prompt", ["", [], [[]], ["a", 1], [1.5], [["a"]], {"a": 1}, None])
def test_other_forms_of_prompt_are_refused(prompt):
    with pytest.raises(ApiError) as caught:
        completion(prompt=prompt)
    assert caught.value.status == 400
    assert caught.value.param.startswith("prompt")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, None), ({"logprobs": False}, None), ({"logprobs": True}, 0)]
    + [({"logprobs": True, "top_logprobs": count}, count) for count in (0, 20)],
)
def test_a_chat_asks_for_log_probabilities_in_two_fields(fields, expected):
    assert chat(**fields).asked_logprobs == expected


def test_biases_are_by_token_id():
    assert chat(logit_bias={"0": 1, "70": -100}).biases() == ((0, 1.0), (70, -100.0))
    assert chat(logit_bias=None).biases() == ()


@pytest.mark.parametrize(
    "fields", [{"logprobs": 6}, {"logprobs": True}, {"max_tokens": 0}, {"echo": "yes"}]
)
def test_a_wrong_value_of_a_completion_is_named(fields):
    with pytest.raises(ApiError) as caught:
        completion(**fields)
    assert caught.value.param in fields and caught.value.code == "invalid_value"


def test_nothing_needs_to_be_generated_behind_an_echo():
    assert completion(max_tokens=0, echo=True).max_tokens == 0


@pytest.mark.parametrize("fields", [{"suffix": "x"}, {"best_of": 2}])
def test_completion_features_that_are_not_built_are_refused(fields):
    with pytest.raises(ApiError) as caught:
        completion(**fields)
    assert caught.value.param in fields


def test_prompts_times_n_is_bounded():
    with pytest.raises(ApiError, match="over 1024"):
        completion(prompt=["a"] * 100, n=128)

"""/tokenize and /detokenize: what a client counts is what a request of it costs."""

import pytest

from aegaeon.proxy.tokenizer import TextModel
from tests.proxy.test_routes import CHAT, CHAT_PATH, ask, error_of, post
from tests.support.proxy_server import CONTEXT_TOKENS, TEXT, Proxy, write_text_model

TOOLS_TEMPLATE = (
    "{% for tool in tools or [] %}<tool_call>{{ tool.function.name }}{% endfor %}"
    "{% for one in messages %}{{ one.content }}{% endfor %}"
)
DEEP = {"a": "x"}
for _ in range(900):
    DEEP = {"a": DEEP}


@pytest.fixture
def proxy(tmp_path):
    return Proxy(tmp_path)


def test_a_prompt_becomes_its_tokens_and_they_the_prompt(proxy):
    told = post(proxy, "/tokenize", {"model": "m", "prompt": TEXT}).json()
    assert told["tokens"] == list(proxy.text.encode(TEXT))
    assert (told["count"], told["max_model_len"]) == (len(told["tokens"]), CONTEXT_TOKENS)
    back = post(proxy, "/detokenize", {"model": "m", "tokens": told["tokens"]}).json()
    assert back == {"prompt": TEXT}


def test_a_conversation_counts_as_a_request_of_it_does(proxy):
    counted, answered = ask(
        proxy,
        ("POST", "/tokenize", {"json": CHAT}),
        ("POST", CHAT_PATH, {"json": CHAT}),
    )
    assert counted.json()["count"] == answered.json()["usage"]["prompt_tokens"]
    assert tuple(counted.json()["tokens"]) == proxy.instance.submitted[0].prompt_token_ids
    body = {**CHAT, "add_generation_prompt": False}
    assert post(proxy, "/tokenize", body).json()["count"] < counted.json()["count"]


def test_tools_count_as_in_a_request(tmp_path):
    proxy = Proxy(tmp_path)
    write_text_model(tmp_path / "m", template=TOOLS_TEMPLATE)
    tools = [{"type": "function", "function": {"name": "look_up", "description": "Looks."}}]
    plain, counted, answered = ask(
        proxy,
        ("POST", "/tokenize", {"json": CHAT}),
        ("POST", "/tokenize", {"json": {**CHAT, "tools": tools}}),
        ("POST", CHAT_PATH, {"json": {**CHAT, "tools": tools}}),
    )
    assert counted.json()["count"] > plain.json()["count"]
    assert tuple(counted.json()["tokens"]) == proxy.instance.submitted[0].prompt_token_ids
    assert answered.status_code == 200


@pytest.mark.parametrize("path", ["/tokenize", CHAT_PATH])
def test_what_a_template_makes_of_little_is_bounded_before_it_is_tokenised(
    tmp_path, monkeypatch, path
):
    proxy = Proxy(tmp_path)
    write_text_model(tmp_path / "m", template="{% for _ in range(20000) %}{{ word }}{% endfor %}")
    tokenised = []
    monkeypatch.setattr(TextModel, "_ids", lambda _, text, __: tokenised.append(text) or ())
    body = {**CHAT, "chat_template_kwargs": {"word": "word "}}
    response = post(proxy, path, body)
    assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded")
    assert tokenised == []


def test_tokens_have_names_where_asked(proxy):
    body = {"model": "m", "prompt": "The fox", "return_token_strs": True}
    told = post(proxy, "/tokenize", body).json()
    assert "".join(told["token_strs"]).replace("Ġ", " ") == "The fox"
    assert post(proxy, "/tokenize", {"model": "m", "prompt": "x"}).json()["token_strs"] is None


def test_control_signs_are_kept_on_the_way_back(proxy):
    told = post(proxy, "/detokenize", {"model": "m", "tokens": [1, 2]}).json()
    assert told["prompt"] == "<|im_start|><|im_end|>"


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/tokenize", {"model": "m"}, "prompt", "invalid_value"),
        ("/tokenize", {**CHAT, "prompt": "x"}, "prompt", "invalid_value"),
        ("/tokenize", {"model": "m", "prompt": 5}, "prompt", "invalid_value"),
        ("/tokenize", {"model": "m", "prompt": "x" * 100_000}, "prompt", "context_length_exceeded"),
        ("/tokenize", {"model": "x", "prompt": "y"}, "model", "model_not_found"),
        ("/tokenize", {"model": "m", "messages": [{"role": "user"}]}, "messages[0].content", None),
        ("/tokenize", {**CHAT, "messages": CHAT["messages"] * 5000}, "messages", "invalid_value"),
        ("/tokenize", {**CHAT, "chat_template_kwargs": DEEP}, "chat_template_kwargs", None),
        ("/tokenize", {**CHAT, "tools": [{"type": "x"}]}, "tools[0].type", "invalid_value"),
        ("/detokenize", {"model": "m", "tokens": [384]}, "tokens", "invalid_value"),
        ("/detokenize", {"model": "m", "tokens": [-1]}, "tokens", "invalid_value"),
        ("/detokenize", {"model": "m"}, "tokens", "missing_required_parameter"),
    ],
)
def test_what_cannot_be_is_named(proxy, path, body, param, code):
    response = post(proxy, path, body)
    assert response.status_code in (400, 404)
    error = error_of(response)
    assert error["param"] == param
    assert code is None or error["code"] == code

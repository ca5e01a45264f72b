"""The routes without sockets: answers in OpenAI's shapes, errors on every path."""

import asyncio
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion

from tests.support.fake_instance import wait_until
from tests.support.proxy_server import CONTEXT_TOKENS, NOT_WAITED, TEXT, Proxy, in_memory

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
TEXT_BODY = {"model": "m", "prompt": "hello", "max_tokens": 200}
CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def proxy(tmp_path):
    return Proxy(tmp_path)


def ask(proxy, *calls, before=None):
    """Send requests one after another; each is (method, path, keywords for httpx)."""

    async def test():
        async with in_memory(proxy) as client:
            if before is not None:
                before()
            return [await client.request(m, path, **options) for m, path, options in calls]

    return asyncio.run(asyncio.wait_for(test(), 60))


def post(proxy, path, body, **options):
    (response,) = ask(proxy, ("POST", path, {"json": body, **options}))
    return response


def error_of(response):
    """Check an error's shape and return it."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and isinstance(error["type"], str)
    return error


def test_a_chat_is_answered(proxy):
    response = post(proxy, CHAT_PATH, CHAT)
    assert response.status_code == 200
    answer = ChatCompletion.model_validate(response.json())
    choice = answer.choices[0]
    assert choice.message.content == TEXT
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
    assert answer.object == "chat.completion"
    raw = response.json()["choices"][0]
    assert raw["logprobs"] is None
    assert raw["message"]["refusal"] is None
    prompt = proxy.text.encode_chat(CHAT["messages"])
    assert proxy.instance.submitted[0].prompt_token_ids == prompt
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(proxy.answer) + 1
    assert answer.usage.total_tokens == len(prompt) + len(proxy.answer) + 1
    assert response.json()["aegaeon"] == NOT_WAITED


def test_a_completion_is_answered(proxy):
    response = post(proxy, TEXT_PATH, TEXT_BODY)
    answer = Completion.model_validate(response.json())
    assert answer.choices[0].text == TEXT
    assert answer.object == "text_completion"
    assert proxy.instance.submitted[0].prompt_token_ids == proxy.text.encode("hello")


def test_a_completion_stops_at_sixteen_tokens_unless_told_otherwise(proxy):
    response = post(proxy, TEXT_PATH, {"model": "m", "prompt": "hello"})
    answer = response.json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 16


def test_every_prompt_has_n_choices_by_index(proxy):
    body = {**TEXT_BODY, "prompt": [[1, 2], [3, 4, 5]], "n": 2, "seed": 7, "max_tokens": 5}
    answer = Completion.model_validate(post(proxy, TEXT_PATH, body).json())
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 20
    sent = sorted((r.prompt_token_ids, r.sampling.seed) for r in proxy.instance.submitted)
    assert [prompt for prompt, _ in sent] == [(1, 2), (1, 2), (3, 4, 5), (3, 4, 5)]
    seeds = {prompt: {s for p, s in sent if p == prompt} for prompt, _ in sent}
    assert seeds[1, 2] == seeds[3, 4, 5]
    assert 7 in seeds[1, 2] and len(seeds[1, 2]) == 2


def test_a_missing_seed_is_drawn_anew(proxy):
    ask(proxy, *[("POST", CHAT_PATH, {"json": CHAT})] * 2)
    first, second = proxy.instance.submitted
    assert first.sampling.seed != second.sampling.seed


def test_sampling_reaches_the_instance(proxy):
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3}
    post(proxy, CHAT_PATH, {**CHAT, **given, "max_completion_tokens": 9, "max_tokens": 5})
    request = proxy.instance.submitted[0]
    sampling = request.sampling
    assert {name: getattr(sampling, name) for name in given} == given
    assert request.max_tokens == 9


def test_the_models_own_defaults_apply_where_the_client_says_nothing(tmp_path):
    proxy = Proxy(tmp_path)
    values = {"do_sample": False, "temperature": 0.6, "top_k": 20, "eos_token_id": [1, 2]}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(values))
    post(proxy, CHAT_PATH, {**CHAT, "top_k": -1})
    request = proxy.instance.submitted[0]
    assert (request.sampling.temperature, request.sampling.top_k) == (0.6, 0)
    assert request.stop_token_ids == (1, 2)


def test_ignore_eos_takes_the_stop_tokens_away(proxy):
    post(proxy, CHAT_PATH, {**CHAT, "ignore_eos": True, "max_tokens": 4})
    assert proxy.instance.submitted[0].stop_token_ids == ()


def test_a_stop_string_ends_the_answer_and_cancels_the_rest(proxy):
    response = post(proxy, CHAT_PATH, {**CHAT, "stop": ["als 世界", "never"]})
    choice = response.json()["choices"][0]
    assert choice["message"]["content"] == TEXT.split("als 世界")[0]
    assert choice["finish_reason"] == "stop"


def test_the_answer_may_fill_the_context_but_not_more(proxy):
    prompt = [5] * (CONTEXT_TOKENS - 3)
    body = {"model": "m", "prompt": prompt}
    clamped, exact, over, full = ask(
        proxy,
        ("POST", TEXT_PATH, {"json": body}),
        ("POST", TEXT_PATH, {"json": {**body, "max_tokens": 3}}),
        ("POST", TEXT_PATH, {"json": {**body, "max_tokens": 4}}),
        ("POST", TEXT_PATH, {"json": {**body, "prompt": [5] * CONTEXT_TOKENS}}),
    )
    assert clamped.json()["usage"]["completion_tokens"] == 3
    assert exact.status_code == 200
    for refused in (over, full):
        assert refused.status_code == 400
        assert error_of(refused)["code"] == "context_length_exceeded"
        assert error_of(refused)["param"] == "prompt"


def test_a_token_id_outside_the_vocabulary_is_refused(proxy):
    response = post(proxy, TEXT_PATH, {"model": "m", "prompt": [384]})
    assert (response.status_code, error_of(response)["param"]) == (400, "prompt")


def test_models_are_listed_with_where_they_are(proxy):
    listed, one, missing = ask(
        proxy,
        ("GET", "/v1/models", {}),
        ("GET", "/v1/models/org/other", {}),
        ("GET", "/v1/models/nobody", {}),
    )
    cards = listed.json()["data"]
    assert [card["id"] for card in cards] == ["m", "org/other"]
    assert one.json() == cards[1]
    assert one.json()["max_model_len"] == CONTEXT_TOKENS
    assert one.json()["quantize"] == "none"
    assert missing.status_code == 404
    assert error_of(missing)["code"] == "model_not_found"
    assert not proxy.instance.submitted


def test_health_tells_of_every_instance(proxy):
    (response,) = ask(proxy, ("GET", "/health", {}))
    assert response.status_code == 200
    report = response.json()
    assert report["status"] == "ok"
    assert report["instances"][0]["id"] == "instance-0"


def test_health_is_503_while_no_instance_is_ready(proxy):
    async def test():
        async with in_memory(proxy) as client:
            proxy.instance.publish("starting")
            service = proxy.service
            await asyncio.to_thread(wait_until, lambda: not service.gateway.is_ready())
            return await client.get("/health"), await client.get("/v1/models")

    response, models = asyncio.run(test())
    assert response.status_code == 503
    assert response.json()["status"] == "unavailable"
    assert models.status_code == 200
    assert not proxy.instance.submitted


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/org/other"])
def test_head_answers_wherever_get_does(proxy, path):
    (response,) = ask(proxy, ("HEAD", path, {}))
    assert response.status_code == 200


ERRORS = [
    ("GET", "/nowhere", {}, 404, "not_found"),
    ("GET", "/v1/nothing", {}, 404, "not_found"),
    ("POST", "/v1/chat/completions/", {"json": CHAT}, 404, "not_found"),
    ("GET", "/docs", {}, 404, "not_found"),
    ("GET", CHAT_PATH, {}, 405, "method_not_allowed"),
    ("DELETE", "/v1/models", {}, 405, "method_not_allowed"),
    ("POST", "/health", {"json": {}}, 405, "method_not_allowed"),
    ("POST", CHAT_PATH, {"content": b"{"}, 400, "invalid_json"),
    ("POST", TEXT_PATH, {"content": b""}, 400, "invalid_json"),
    ("POST", CHAT_PATH, {"json": []}, 400, "invalid_value"),
    ("POST", CHAT_PATH, {"json": {**CHAT, "n": 0}}, 400, "invalid_value"),
    ("POST", CHAT_PATH, {"json": {**CHAT, "functions": [{}]}}, 400, "unsupported_parameter"),
    ("POST", CHAT_PATH, {"json": {**CHAT, "logit_bias": {"384": 1}}}, 400, "invalid_value"),
    ("POST", CHAT_PATH, {"json": {**CHAT, "model": "x"}}, 404, "model_not_found"),
    ("POST", TEXT_PATH, {"json": {**TEXT_BODY, "model": "../m"}}, 404, "model_not_found"),
    ("POST", CHAT_PATH, {"content": b"a=b", "headers": {"content-type": "text/plain"}}, 415, None),
    ("POST", CHAT_PATH, {"content": json.dumps(CHAT).encode(), "headers": {}}, 415, None),
    ("POST", CHAT_PATH, {"content": b" " * 3000}, 413, "request_too_large"),
]


@pytest.mark.parametrize(("method", "path", "options", "status", "code"), ERRORS)
def test_errors_have_openais_shape_on_every_path(tmp_path, method, path, options, status, code):
    proxy = Proxy(tmp_path, max_body_bytes=2048)
    if "content" in options:
        options = {"headers": {"content-type": "application/json"}, **options}
    (response,) = ask(proxy, (method, path, options))
    assert response.status_code == status
    error = error_of(response)
    assert code is None or error["code"] == code
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("code", "status", "is_retriable"),
    [
        ("overloaded", 503, True),
        ("model_loading", 503, True),
        ("timeout", 504, False),
        ("checkpoint_error", 500, False),
        ("out_of_blocks", 400, False),
        ("internal_error", 500, False),
        ("never heard of", 500, False),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_instances_failure_becomes_a_status(proxy, code, status, is_retriable, stream):
    def fail():
        proxy.instance.fail_with = (code, "/secret/path is broken")

    body = {**CHAT, "stream": stream}
    (response,) = ask(proxy, ("POST", CHAT_PATH, {"json": body}), before=fail)
    assert response.status_code == status
    error = error_of(response)
    assert status != 500 or "/secret" not in error["message"]
    assert response.headers["x-should-retry"] == ("true" if is_retriable else "false")
    assert ("retry-after" in response.headers) == is_retriable


def test_a_draining_server_takes_nothing_new(proxy):
    def drain():
        proxy.service.is_draining = True

    chat, health = ask(
        proxy, ("POST", CHAT_PATH, {"json": CHAT}), ("GET", "/health", {}), before=drain
    )
    assert (chat.status_code, error_of(chat)["code"]) == (503, "draining")
    assert "retry-after" in chat.headers
    assert (health.status_code, health.json()["status"]) == (503, "draining")


def test_a_fault_of_ours_is_a_500_without_internals(proxy, monkeypatch, caplog):
    def break_down(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr("aegaeon.proxy.service.messages_for_template", break_down)
    response = post(proxy, CHAT_PATH, CHAT)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert error_of(response)["code"] == "internal_error"
    assert "secret" in caplog.text


def test_a_model_without_a_template_cannot_chat(tmp_path):
    proxy = Proxy(tmp_path)
    (tmp_path / "m" / "tokenizer_config.json").write_text("{}")
    response = post(proxy, CHAT_PATH, CHAT)
    assert response.status_code == 400
    assert "chat template" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("sent", "is_kept"),
    [("abc-123", True), ("x" * 129, False), ("a b", False), ("", False)],
)
def test_a_clean_request_id_is_the_clients_own(proxy, sent, is_kept):
    (response,) = ask(proxy, ("GET", "/v1/models", {"headers": {"x-request-id": sent}}))
    got = response.headers["x-request-id"]
    assert got
    assert (got == sent) == is_kept


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *("model", "messages", "prompt", "temperature", "top_p", "top_k", "min_p", "seed"),
        *("max_tokens", "max_completion_tokens", "n", "stop", "stream", "stream_options"),
        *("ignore_eos", "logit_bias", "presence_penalty", "repetition_penalty", "logprobs"),
        *("top_logprobs", "parallel_tool_calls", "tools", "tool_choice", "response_format"),
        *("metadata", "user", "echo", "suffix", "best_of", "chat_template_kwargs"),
    ]
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system"]) | JSON},
    optional={"content": st.text(max_size=9) | JSON, "tool_calls": JSON, "name": JSON},
)


@pytest.fixture(scope="module")
def ask_again(tmp_path_factory):
    """Send requests to the same server again and again."""
    loop = asyncio.new_event_loop()
    served = in_memory(Proxy(tmp_path_factory.mktemp("fuzz")))
    client = loop.run_until_complete(served.__aenter__())

    async def send(calls):
        return [await client.request(m, path, **options) for m, path, options in calls]

    yield lambda calls: loop.run_until_complete(asyncio.wait_for(send(calls), 60))
    loop.run_until_complete(served.__aexit__(None, None, None))
    loop.close()


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(
    bodies=st.lists(
        st.tuples(
            st.sampled_from([CHAT_PATH, TEXT_PATH]),
            st.dictionaries(FIELDS, JSON, max_size=4),
            st.lists(MESSAGE, min_size=1, max_size=3),
            st.booleans(),
        ),
        min_size=10,
        max_size=10,
    )
)
def test_no_body_is_a_fault_of_ours(ask_again, bodies):
    calls = []
    for path, fields, messages, is_based in bodies:
        base = {"model": "m", "messages": messages, "prompt": "x", "max_tokens": 3}
        body = {**base, **fields} if is_based else fields
        headers = {"content-type": "application/json"}
        calls.append(("POST", path, {"content": json.dumps(body), "headers": headers}))
    for response in ask_again(calls):
        assert response.status_code in (200, 400, 404, 429), response.text
        if response.status_code != 200:
            error_of(response)

"""What millions of values would take is not made of a body, and not kept of one."""

import asyncio
import gc
import json

import msgspec
import pytest

from aegaeon.proxy.failures import ApiError
from aegaeon.proxy.generation import SCORE_BYTES, TOKEN_BYTES
from aegaeon.proxy.openai import ChatBody, CompletionBody, parse_chat, parse_completion
from aegaeon.proxy.tokenize import parse_detokenize
from aegaeon.proxy.values import MAX_NESTED, MAX_STRINGS, MAX_VALUES, check_values, size_of
from tests.proxy.test_routes import CHAT, CHAT_PATH, ask, error_of, post
from tests.support.proxy_server import CONTEXT_TOKENS, Proxy, in_memory

MEGABYTES = 8 << 20


def padded(before, unit, after, size=MEGABYTES):
    return before + unit * ((size - len(before) - len(after)) // len(unit)) + after


HELLO = b'"messages":[{"role":"user","content":"a"}]}'
MANY = {
    "ids": (parse_completion, padded(b'{"model":"m","prompt":[0', b",0", b"]}")),
    "lists of ids": (parse_completion, padded(b'{"model":"m","prompt":[[0]', b",[0]", b"]}")),
    "tokens": (parse_detokenize, padded(b'{"model":"m","tokens":[0', b",0", b"]}")),
    "messages": (
        parse_chat,
        padded(
            b'{"model":"m","messages":[{"role":"user","content":"a"}',
            b',{"role":"user","content":"a"}',
            b"]}",
        ),
    ),
    "objects": (parse_chat, padded(b'{"model":"m","metadata":{"a":[{}', b",{}", b"]}," + HELLO)),
    "nesting": (parse_chat, padded(b'{"model":"m","x":', b"[", b"")),
    "strings": (parse_chat, padded(b'{"model":"m","stop":["a"', b',"a"', b"]," + HELLO)),
    "keys": (
        parse_chat,
        b'{"model":"m","logit_bias":{%s},%s'
        % (b",".join(b'"%d":1' % key for key in range(MAX_STRINGS + 1)), HELLO),
    ),
    "arguments": (
        parse_chat,
        b'{"model":"m","messages":[{"role":"assistant","tool_calls":[%s]}]}'
        % b",".join(
            [
                b'{"function":{"name":"f","arguments":"%s"}}'
                % padded(b'{\\"a\\":[[]', b",[]", b"]}", 300_000)
            ]
            * 8
        ),
    ),
}


@pytest.mark.parametrize("kind", MANY)
def test_millions_of_values_are_refused_before_they_are_made(kind, monkeypatch):
    parse, raw = MANY[kind]
    decode, decoded = msgspec.json.decode, []

    def counted(text, **options):
        decoded.append(text)
        return decode(text, **options)

    monkeypatch.setattr(msgspec.json, "decode", counted)
    with pytest.raises(ApiError, match="at most") as caught:
        parse(raw)
    assert (caught.value.status, caught.value.code) == (400, "invalid_value")
    # Calls' arguments are text of which nothing is made yet.
    assert len(decoded) == (kind == "arguments")


def test_signs_within_strings_are_no_values():
    text = 'x,y [{"a\\": [1, 2]}]\n' * 120_000
    assert text.count(",") + text.count("[") > MAX_NESTED
    body = parse_chat(
        json.dumps({**CHAT, "messages": [{"role": "user", "content": text}]}).encode()
    )
    assert body.messages[0].content == text


@pytest.mark.parametrize(
    ("unit", "most"), [(b"0", MAX_VALUES), (b"[]", MAX_NESTED - 1), (b'""', MAX_STRINGS)]
)
def test_the_bounds_are_what_they_are_said_to_be(unit, most):
    check_values([b"[%s]" % b",".join([unit] * most)])
    with pytest.raises(ApiError, match=f"at most {most if unit != b'[]' else MAX_NESTED} "):
        check_values([b"[%s]" % b",".join([unit] * (most + 2))])


def test_several_texts_count_together():
    half = b"[%s]" % b",".join([b"[]"] * (MAX_NESTED // 2))
    check_values([half])
    with pytest.raises(ApiError, match=r"'messages' has 65538 objects"):
        check_values([half, half], "messages")


def test_prompts_are_counted_before_they_are_copied():
    raw = b'{"model":"m","prompt":[%s]}' % b",".join([b"[0]"] * 1025)
    with pytest.raises(ApiError, match="prompts times n"):
        msgspec.json.decode(raw, type=CompletionBody).prompts()


def test_what_does_not_fit_by_far_is_not_looked_at_id_by_id(tmp_path):
    # An id that is none of the model's stands at the end; that there are too many comes first.
    ids = [5] * (5 * CONTEXT_TOKENS) + [10**6]
    proxy = Proxy(tmp_path)
    for path, body, param in (
        ("/v1/completions", {"prompt": ids}, "prompt"),
        ("/v1/completions", {"prompt": ids, "echo": True}, "prompt"),
        ("/detokenize", {"tokens": ids}, "tokens"),
    ):
        error = error_of(post(proxy, path, {"model": "m", **body}))
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)


def test_a_text_that_is_far_too_long_is_not_all_tokenised(tmp_path, monkeypatch):
    proxy = Proxy(tmp_path)
    encode, encoded = type(proxy.text)._ids, []

    def counted(model, text, add_special_tokens):
        encoded.append(len(text))
        return encode(model, text, add_special_tokens)

    monkeypatch.setattr(type(proxy.text), "_ids", counted)
    text = "ab " * (CONTEXT_TOKENS * proxy.text.longest_token_chars)
    for path, body in (
        ("/tokenize", {"prompt": text}),
        ("/v1/completions", {"prompt": text}),
        ("/v1/completions", {"prompt": [text, text]}),
        (CHAT_PATH, {"messages": [{"role": "user", "content": text}]}),
        ("/tokenize", {"messages": [{"role": "user", "content": text}]}),
    ):
        del encoded[:]
        error = error_of(post(proxy, path, {"model": "m", **body}))
        assert error["code"] == "context_length_exceeded"
        assert 0 < sum(encoded) <= len(text) / 2


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        (CHAT_PATH, ChatBody, CHAT),
        ("/v1/completions", CompletionBody, {"model": "m", "prompt": "hello", "stop": ["x"]}),
    ],
)
@pytest.mark.parametrize("is_streamed", [True, False])
def test_no_body_is_kept_while_its_answer_is_under_way(tmp_path, path, kind, body, is_streamed):
    proxy = Proxy(tmp_path)
    body = {**body, "stream": is_streamed, "metadata": {"a": ["x"]}, "max_tokens": 8}

    async def test():
        async with in_memory(proxy) as client:
            proxy.instance.hold_after = 1
            asking = asyncio.create_task(client.post(path, json=body))
            while not proxy.instance.submitted:
                await asyncio.sleep(0.01)
            gc.collect()
            kept = [one for one in gc.get_objects() if type(one) is kind]
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            return kept

    gc.collect()
    before = [one for one in gc.get_objects() if type(one) is kind]
    assert not [one for one in asyncio.run(asyncio.wait_for(test(), 60)) if one not in before]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"user": "x" * 1025}, "user"),
        ({"model": "x" * 201}, "model"),
        ({"messages": [{**CHAT["messages"][0], "name": "x" * 201}]}, "messages[0].name"),
        ({"messages": [{"role": "x" * 10**6, "content": "a"}]}, "messages[0].role"),
    ],
)
def test_names_are_short_and_so_is_what_is_said_of_them(tmp_path, change, param):
    response = post(Proxy(tmp_path), CHAT_PATH, {**CHAT, **change})
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", param)
    assert len(response.content) < 3000


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/completions"])
def test_no_route_takes_a_long_name_of_a_model(tmp_path, path):
    given = {"/tokenize": {"prompt": "a"}, "/detokenize": {"tokens": [1]}}
    body = {"model": "x" * 201, **given.get(path, {"prompt": "a"})}
    error = error_of(post(Proxy(tmp_path), path, body))
    assert (error["code"], error["param"]) == ("invalid_value", "model")


def test_a_model_that_is_looked_up_by_a_long_name_is_not_repeated_whole(tmp_path):
    (response,) = ask(Proxy(tmp_path), ("GET", f"/v1/models/{'x' * 50_000}", {}))
    assert response.status_code == 404
    assert len(response.content) < 3000


@pytest.mark.parametrize("path", ["/tokenize", CHAT_PATH])
@pytest.mark.parametrize("field", ["reasoning_content", "tool_call_id", "tool_calls"])
def test_all_that_a_template_is_given_counts(tmp_path, monkeypatch, path, field):
    proxy = Proxy(tmp_path)
    rendered = []
    monkeypatch.setattr(
        "aegaeon.proxy.rendering.BoundTemplate.render", lambda *_: rendered.append(1) or "x"
    )
    long = "x" * (5 * CONTEXT_TOKENS * proxy.text.longest_token_chars)
    value = [{"function": {"name": "f", "arguments": json.dumps({"a": long})}}]
    message = {"role": "assistant", "content": "a", field: value if field[-1] == "s" else long}
    response = post(proxy, path, {"model": "m", "messages": [message]})
    error = error_of(response)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert not rendered


def test_what_is_kept_for_an_answer_counts_as_open(tmp_path):
    proxy = Proxy(tmp_path, max_open_mb=0.02)
    biases = {str(token): 1 for token in range(300)}
    scored = {"model": "m", "prompt": [5] * 100, "echo": True, "logprobs": 2}

    async def test():
        async with in_memory(proxy) as client:
            proxy.instance.hold_after = 1
            first = asyncio.create_task(client.post(CHAT_PATH, json=CHAT))
            while not proxy.instance.submitted:
                await asyncio.sleep(0.01)
            answers = [
                await client.post("/v1/completions", json={**scored, "max_tokens": 8}),
                await client.post(CHAT_PATH, json={**CHAT, "logit_bias": biases}),
            ]
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            return answers

    for refused in asyncio.run(asyncio.wait_for(test(), 60)):
        assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_that_are_kept_count_as_open(tmp_path, stream):
    proxy = Proxy(tmp_path, max_open_mb=0.04)
    proxy.answer = (proxy.answer * 80)[:80]
    scored = {"model": "m", "prompt": [5], "logprobs": 5, "max_tokens": 80, "stream": stream}
    held_bytes = 64 * 6 * SCORE_BYTES

    async def test():
        async with in_memory(proxy) as client:
            proxy.instance.hold_after = 64
            first = asyncio.create_task(client.post("/v1/completions", json=scored))
            queue = proxy.service.gateway._queue
            # What a stream has sent is not kept.
            wanted = TOKEN_BYTES + (0 if stream else held_bytes)
            began = {}
            while not (began and queue._bytes == wanted):
                began = {o.id: o.made for o in proxy.service.gateway._open.values() if o.made == 64}
                await asyncio.sleep(0.01)
            proxy.instance.hold_after = 0
            second = asyncio.create_task(client.post("/v1/completions", json=scored))
            answer = None
            if not stream:
                answer = await second
            proxy.instance.release()
            assert (await first).status_code == 200
            if stream:
                assert (await second).status_code == 200
            while queue._bytes or queue._held:
                await asyncio.sleep(0.01)
            return answer

    refused = asyncio.run(asyncio.wait_for(test(), 60))
    if not stream:
        assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
        assert "--max-open-mb" in error_of(refused)["message"]


def test_the_size_of_values_is_about_what_they_take():
    assert size_of("x" * 1000) == pytest.approx(1000, rel=0.1)
    assert size_of([{"a": {}}] * 100) > 100 * 64 * 2

"""Bodies are bounded in bytes and in time, and prompts before they are tokenised."""

import asyncio

import pytest
from starlette.requests import Request

from aegaeon.proxy.bodies import Bodies
from aegaeon.proxy.failures import ApiError
from aegaeon.proxy.generation import TOKEN_BYTES
from tests.support.proxy_server import Proxy, in_memory

BODIES = Bodies(lambda: 1e9)
ENDLESS = "word " * 200_000
MESSAGES = [{"role": "user", "content": ENDLESS}]


def test_a_body_that_only_trickles_is_given_up():
    async def trickle():
        await asyncio.sleep(0.001)
        return {"type": "http.request", "body": b" ", "more_body": True}

    request = Request(
        {"type": "http", "headers": [(b"content-type", b"application/json")]}, trickle
    )
    with pytest.raises(ApiError) as caught:
        asyncio.run(asyncio.wait_for(BODIES.read(request, 1 << 20, within_s=0.05), 20))
    assert (caught.value.status, caught.value.code) == (408, "request_timeout")


@pytest.mark.parametrize(
    ("path", "param", "value"),
    [("/v1/chat/completions", "messages", MESSAGES), ("/v1/completions", "prompt", ENDLESS)],
)
def test_megabytes_are_refused_without_tokenising_them(tmp_path, path, param, value):
    async def test():
        async with in_memory(Proxy(tmp_path)) as client:
            return await client.post(path, json={"model": "m", param: value})

    response = asyncio.run(test())
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == param
    assert "characters" in error["message"]


def nested(depth):
    value = "x"
    for _ in range(depth):
        value = {"a": [value]} if depth % 2 else {"a": value}
    return value


CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
PART = {"type": "text", "text": "x"}
CALL = {"function": {"name": "f", "arguments": "{}"}}


def tool(**fields):
    return {"type": "function", "function": {"name": "f", **fields}}


def shape(schema):
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": CHAT["messages"] * 4097}, "messages"),
        ({"messages": [{"role": "user", "content": [PART] * 4097}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL] * 4097}]}, "messages"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": "a" * 1025}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"n": 129}, "n"),
        ({"logit_bias": {str(token): 1 for token in range(4097)}}, "logit_bias"),
        ({"metadata": nested(65)}, "metadata"),
        ({"tools": [tool()] * 129}, "tools"),
        ({"tools": [tool(parameters=nested(100))]}, "tools"),
        ({"tools": [tool(parameters={"enum": ["x"] * 20_001})]}, "tools"),
        ({"tools": [tool(description="x" * (1 << 21))]}, "tools"),
        ({"tools": [tool(parameters={"x" * (1 << 21): 1})]}, "tools"),
        ({"tools": [tool(parameters={"allOf": [{"pattern": "a"}] * 9})]}, "tools"),
        ({"response_format": shape({"items": {"allOf": [{}] * 65}})}, "response_format"),
        ({"response_format": shape(nested(80))}, "response_format"),
        ({"functions": [nested(80)]}, "functions"),
        ({"chat_template_kwargs": nested(80)}, "chat_template_kwargs"),
    ],
)
def test_what_is_too_much_of_anything_is_refused_by_its_name(tmp_path, change, param):
    async def test():
        async with in_memory(Proxy(tmp_path)) as client:
            return await client.post("/v1/chat/completions", json={**CHAT, **change})

    response = asyncio.run(test())
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", param)
    assert len(response.text) < 1000


def test_prompts_that_are_open_are_bounded_in_bytes(tmp_path):
    prompt = list(range(3, 103))
    proxy = Proxy(tmp_path, max_open_mb=2.5 * 100 * TOKEN_BYTES / 1e6)
    body = {"model": "m", "prompt": prompt, "max_tokens": 8}

    async def test():
        async with in_memory(proxy) as client:
            proxy.instance.hold_after = 1
            path = "/v1/completions"
            open_ones = [asyncio.create_task(client.post(path, json=body)) for _ in range(2)]
            while proxy.service.gateway.open_requests < 2:
                await asyncio.sleep(0.01)
            refused = await client.post(path, json=body)
            small = asyncio.create_task(client.post(path, json={**body, "prompt": [5]}))
            while proxy.service.gateway.open_requests < 3:
                await asyncio.sleep(0.01)
            for one in (*open_ones, small):
                one.cancel()
            await asyncio.gather(*open_ones, small, return_exceptions=True)
            while proxy.service.gateway.open_requests:
                await asyncio.sleep(0.01)
            proxy.instance.hold_after = None
            return refused, await client.post(path, json=body)

    refused, later = asyncio.run(asyncio.wait_for(test(), 60))
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert later.status_code == 200

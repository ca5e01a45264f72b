"""Bodies are bounded in bytes and in time, and prompts before they are tokenised."""

import asyncio

import pytest
from starlette.requests import Request

from aegaeon.proxy.failures import ApiError
from aegaeon.proxy.limits import read_json_body
from tests.support.proxy_server import Proxy, in_memory

ENDLESS = "word " * 200_000
MESSAGES = [{"role": "user", "content": ENDLESS}]


def test_a_body_that_only_trickles_is_given_up():
    async def trickle():
        await asyncio.sleep(0.001)
        return {"type": "http.request", "body": b" ", "more_body": True}

    request = Request({"type": "http", "headers": []}, trickle)
    with pytest.raises(ApiError) as caught:
        asyncio.run(asyncio.wait_for(read_json_body(request, 1 << 20, within_s=0.05), 20))
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

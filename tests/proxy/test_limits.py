"""Bodies are bounded in bytes and in time."""

import asyncio

import pytest
from starlette.requests import Request

from aegaeon.proxy.failures import ApiError
from aegaeon.proxy.limits import read_json_body


def test_a_body_that_only_trickles_is_given_up():
    async def trickle():
        await asyncio.sleep(0.001)
        return {"type": "http.request", "body": b" ", "more_body": True}

    request = Request({"type": "http", "headers": []}, trickle)
    with pytest.raises(ApiError) as caught:
        asyncio.run(asyncio.wait_for(read_json_body(request, 1 << 20, within_s=0.05), 20))
    assert (caught.value.status, caught.value.code) == (408, "request_timeout")

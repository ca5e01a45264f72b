"""What comes in is bounded, in bytes and time, and of the right type before anyone parses it."""

import asyncio

from starlette.requests import ClientDisconnect, Request

from aegaeon.proxy.failures import ApiError
from aegaeon.proxy.waits import within

BODY_S = 60.0


async def read_json_body(request: Request, max_bytes: int, within_s: float = BODY_S) -> bytes:
    """Return the raw body. Raises ApiError 415 for another content type, 413 beyond `max_bytes`,
    408 when it takes too long, 400 when the client goes away in the middle."""
    kind = request.headers.get("content-type", "application/json")
    if kind.split(";")[0].strip().lower() != "application/json":
        raise ApiError(
            415, "unsupported_media_type", "send the body with Content-Type: application/json"
        )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    try:
        return await within(within_s, _read(request, max_bytes))
    except asyncio.TimeoutError:
        text = f"the body did not come within {within_s:.0f} s; send it faster"
        raise ApiError(408, "request_timeout", text) from None
    except ClientDisconnect:
        raise ApiError(400, "invalid_json", "the body ended early") from None


async def _read(request: Request, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    total = 0
    async for part in request.stream():
        total += len(part)
        if total > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
    return b"".join(parts)


def _too_large(max_bytes: int) -> ApiError:
    text = f"the body is over {max_bytes} bytes; shorten it or raise --max-body-bytes"
    return ApiError(413, "request_too_large", text)

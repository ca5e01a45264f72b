"""What comes in is bounded and of the right type before anyone parses it."""

from starlette.requests import ClientDisconnect, Request

from aegaeon.proxy.failures import ApiError


async def read_json_body(request: Request, max_bytes: int) -> bytes:
    """Return the raw body. Raises ApiError 415 for another content type, 413 beyond `max_bytes`,
    400 when the client goes away in the middle."""
    kind = request.headers.get("content-type", "application/json")
    if kind.split(";")[0].strip().lower() != "application/json":
        raise ApiError(
            415, "unsupported_media_type", "send the body with Content-Type: application/json"
        )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    total = 0
    try:
        async for part in request.stream():
            total += len(part)
            if total > max_bytes:
                raise _too_large(max_bytes)
            parts.append(part)
    except ClientDisconnect:
        raise ApiError(400, "invalid_json", "the body ended early") from None
    return b"".join(parts)


def _too_large(max_bytes: int) -> ApiError:
    text = f"the body is over {max_bytes} bytes; shorten it or raise --max-body-bytes"
    return ApiError(413, "request_too_large", text)

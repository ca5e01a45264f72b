"""What comes in is bounded, in bytes and time, and of the right type before anyone parses it."""

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request

from aegaeon.proxy.failures import ApiError, invalid
from aegaeon.proxy.waits import within

BODY_S = 60.0
MAX_MESSAGES = 4096
MAX_PARTS = 4096  # of all messages together
MAX_CALLS = 4096  # likewise
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_BIASES = 1024
MAX_TREE_DEPTH = 64
MAX_TREE_NODES = 20_000
MAX_TREE_CHARS = 1 << 20
MAX_ALL_OF = 64  # schemas of one that all have to hold
MAX_MET_PATTERNS = 8  # of those: what meets all of them may take as much as their product


async def read_json_body(request: Request, max_bytes: int, within_s: float = BODY_S) -> bytes:
    """Return the raw body. Raises ApiError 415 for another content type, 413 beyond `max_bytes`,
    408 when it takes too long, 400 when the client goes away in the middle.

    One without a type is refused, too: a page of another site may send that without asking."""
    kind = request.headers.get("content-type", "")
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


def check_count(param: str, count: int, most: int, what: str) -> None:
    """Raise ApiError when `param` has more than `most` of something."""
    if count > most:
        raise invalid(param, f"'{param}' has {count} {what}; at most {most} are allowed")


def check_stops(stops: Sequence[str]) -> None:
    """Raise ApiError for stop strings that are too many, too long, or none."""
    check_count("stop", len(stops), MAX_STOPS, "strings")
    if any(not stop for stop in stops):
        raise invalid("stop", "'stop' contains an empty string")
    check_count("stop", max(map(len, stops), default=0), MAX_STOP_CHARS, "characters in a string")


def check_tree(param: str, value: Any) -> None:
    """Raise ApiError for JSON that is too deep or too large to be worked with: tools and schemas
    become grammars, which grow with both, and other objects are looked through by templates."""
    level, depth, nodes, chars = [value], 0, 0, 0
    while level:
        depth += 1
        nodes += len(level)
        check_count(param, depth, MAX_TREE_DEPTH, "levels")
        check_count(param, nodes, MAX_TREE_NODES, "values")
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below.extend(one.values())
                chars += sum(map(len, one))
            elif isinstance(one, list):
                below.extend(one)
            elif isinstance(one, str):
                chars += len(one)
        check_count(param, chars, MAX_TREE_CHARS, "characters")
        level = below


def check_schemas(param: str, value: Any) -> None:
    """Raise ApiError where schemas in `value`, which is not too deep, must be met together and are
    many. What they take is bounded elsewhere; this says what is wrong, at once."""
    if isinstance(value, dict):
        met = value.get("allOf")
        if isinstance(met, list):
            check_count(param, len(met), MAX_ALL_OF, "schemas in one 'allOf'")
            patterns = sum(isinstance(one, dict) and "pattern" in one for one in met)
            check_count(param, patterns, MAX_MET_PATTERNS, "patterns in one 'allOf'")
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            check_schemas(param, one)

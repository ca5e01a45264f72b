"""Bodies as they come in: bounded each in type, bytes and time, and in bytes all together."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request

from aegaeon.proxy.failures import ApiError

BODY_S = 60.0
MAX_BODIES = 1024
PER_KEY = 3 / 4  # of all there may be: the rest is for other keys


class _Taken(msgspec.Struct):
    """What has come of bodies that are not whole."""

    bodies: int = 0
    bytes: int = 0


class _Place(msgspec.Struct, frozen=True):
    """Where one body counts."""

    key: str
    of_key: _Taken


class Bodies:
    """Reads bodies. Of those that are on their way all together are bounded, and those of one key;
    one alone is never too much."""

    def __init__(self, most_bytes: Callable[[], float]) -> None:
        """`most_bytes` tells how much there may be now."""
        self._most_bytes = most_bytes
        self._all = _Taken()
        self._by_key: dict[str, _Taken] = {}
        self._readings: set[asyncio.Future[bytes]] = set()

    def refuse(self) -> None:
        """Give up those that are on their way: the server is about to stop."""
        for reading in self._readings:
            reading.cancel()

    @property
    def taken_bytes(self) -> int:
        """How much has come of bodies that are not whole."""
        return self._all.bytes

    async def read(
        self, request: Request, max_bytes: int, key: str = "", within_s: float = BODY_S
    ) -> bytes:
        """Return the raw body of a request with `key`, "": without. Raises ApiError 415 for another
        content type, 413 beyond `max_bytes`, 429 where too much is on its way, 408 when it takes
        too long, 503 after `refuse`, 400 when the client goes away in the middle.

        One without a type is refused, too: a page of another site may send that without asking."""
        kind = request.headers.get("content-type", "")
        if kind.split(";")[0].strip().lower() != "application/json":
            raise ApiError(
                415, "unsupported_media_type", "send the body with Content-Type: application/json"
            )
        declared = request.headers.get("content-length", "")
        declared_bytes = int(declared) if declared.isdecimal() and len(declared) < 20 else 0
        if declared_bytes > max_bytes:
            raise _too_large(max_bytes)
        try:
            with self._entered(key) as place:
                self._check(place, declared_bytes)
                return await self._within(within_s, self._read(request, max_bytes, place))
        except ClientDisconnect:
            raise ApiError(400, "invalid_json", "the body ended early") from None

    async def _within(self, within_s: float, work: Coroutine[Any, Any, bytes]) -> bytes:
        reading = asyncio.ensure_future(work)
        self._readings.add(reading)
        try:
            await asyncio.wait({reading}, timeout=within_s)
            if not reading.done():
                text = f"the body did not come within {within_s:.0f} s; send it faster"
                raise ApiError(408, "request_timeout", text)
            if reading.cancelled():
                raise ApiError(503, "draining", "the server is about to stop")
            return reading.result()
        finally:
            reading.cancel()
            self._readings.discard(reading)

    async def _read(self, request: Request, max_bytes: int, place: _Place) -> bytes:
        body = bytearray()  # not a list: of single bytes that would be forty times as large
        try:
            async for part in request.stream():
                if len(body) + len(part) > max_bytes:
                    raise _too_large(max_bytes)
                self._check(place, len(part))
                body += part
                self._count(place, len(part))
            return bytes(body)
        finally:
            self._count(place, -len(body))

    @contextmanager
    def _entered(self, key: str) -> Iterator[_Place]:
        place = _Place(key, self._by_key.get(key, _Taken()))
        most, of_key = MAX_BODIES, place.of_key
        if self._all.bodies >= most:
            raise _full(f"{most} bodies, all there may be, are on their way")
        if key and of_key.bodies >= most * PER_KEY:
            raise _full(f"this key has {of_key.bodies} bodies on their way, {_OTHERS}")
        self._by_key[key] = of_key
        self._all.bodies += 1
        of_key.bodies += 1
        try:
            yield place
        finally:
            self._all.bodies -= 1
            of_key.bodies -= 1
            if not of_key.bodies:
                del self._by_key[key]

    def _check(self, place: _Place, more: int) -> None:
        """Raise ApiError 429 where `more` bytes of a body that is in are too many."""
        if self._all.bodies == 1:
            return
        most, own = self._most_bytes(), place.of_key.bytes
        if self._all.bytes + more > most:
            raise _full(f"bodies of {most / 1e6:g} MB, all there may be, are on their way")
        if place.key and own + more > most * PER_KEY:
            raise _full(f"this key has bodies of {own / 1e6:g} MB on their way, {_OTHERS}")

    def _count(self, place: _Place, more: int) -> None:
        self._all.bytes += more
        place.of_key.bytes += more


_OTHERS = "and what is left is for other keys"


def _full(text: str) -> ApiError:
    return ApiError(429, "queue_full", f"{text}; try again later")


def _too_large(max_bytes: int) -> ApiError:
    text = f"the body is over {max_bytes} bytes; shorten it or raise --max-body-bytes"
    return ApiError(413, "request_too_large", text)

"""A client of streamed completions for load generators: thousands of streams in one process.

Bytes are stamped when they arrive, then read by an HTTP parser in C and a typed JSON decoder, with
no task, queue or timer per token. HTTP/1.1, plain or with TLS; connections are used again.
"""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

CONNECT_S = 30.0
LAST_CHUNK = b"0\r\n\r\n"
ERROR_BYTES = 1 << 16  # of the body of an error that are read


class StreamError(Exception):
    """The address cannot be used; the message says why."""


@dataclass(slots=True)
class Exchange:
    """One request and what came back. Times are seconds of the monotonic clock; `begun_s` is when
    it was taken up, which an idle generator does at `due_s`. `error` is None for a whole answer."""

    path: str
    body: bytes
    due_s: float
    begun_s: float = 0.0
    status: int = 0
    id: str = ""
    token_times_s: list[float] = field(default_factory=list)
    chunks: int = 0  # in which tokens came
    prompt_tokens: int = 0
    finish_reason: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)  # our servers' own
    error: str | None = "connection"


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: msgspec.Raw | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Failure(msgspec.Struct):
    message: str = ""
    type: str | None = None
    code: str | int | None = None

    def name(self) -> str:
        return str(self.code or self.type or "error")


class _Chunk(msgspec.Struct):
    id: str = ""
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Failure | None = None
    aegaeon: dict[str, Any] | None = None


class _ErrorBody(msgspec.Struct):
    error: _Failure


_chunk = msgspec.json.Decoder(_Chunk)
_error_body = msgspec.json.Decoder(_ErrorBody)


class StreamClient:
    """Asks one server. Use it from one event loop, in an `async with`."""

    def __init__(
        self, base_url: str, api_key: str | None = None, reads_at_end: bool = False
    ) -> None:
        """With `reads_at_end`, what comes is stamped and kept, and read when its answer is whole:
        where many streams have a token at once, reading the first keeps the last ones' stamps
        waiting. Exchanges are empty until then. Raises StreamError when `base_url` is no address.
        """
        address = urlsplit(base_url.rstrip("/"))
        try:
            port = address.port
        except ValueError:
            port = -1
        if address.scheme not in {"http", "https"} or not address.hostname or port == -1:
            raise StreamError(f"{base_url!r} is no address; give http://HOST:PORT")
        self._host = address.hostname
        self._port = port or (443 if address.scheme == "https" else 80)
        self._has_tls = address.scheme == "https"
        # Clients of OpenAI are given an address that ends in /v1; we take both.
        self._prefix = address.path.removesuffix("/v1")
        key = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = (
            f"host: {address.netloc.rpartition('@')[2]}\r\n{key}content-type: application/json\r\n"
            "accept: text/event-stream\r\n"
        )
        self._reads_at_end = reads_at_end
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()

    async def __aenter__(self) -> "StreamClient":
        """Open nothing yet."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close all connections."""
        for connection in tuple(self._all):
            connection.abort()

    async def ask(self, exchange: Exchange) -> None:
        """Send it and fill it in until it has ended; cancelling closes its connection."""
        exchange.begun_s = time.monotonic()
        request = (
            f"POST {self._prefix}{exchange.path} HTTP/1.1\r\n{self._headers}"
            f"content-length: {len(exchange.body)}\r\n\r\n"
        ).encode() + exchange.body
        while self._idle:
            # A server may close an idle connection just when it is used again: then once more.
            if await self._idle.pop().run(exchange, request):
                return
        try:
            connecting = asyncio.get_running_loop().create_connection(
                lambda: _Connection(self._idle, self._all, self._reads_at_end),
                *(self._host, self._port),
                ssl=self._has_tls or None,
            )
            _, connection = await asyncio.wait_for(connecting, CONNECT_S)
        except (OSError, asyncio.TimeoutError):
            return
        await connection.run(exchange, request)


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time; puts itself among the idle ones between them."""

    def __init__(
        self, idle: "list[_Connection]", everyone: "set[_Connection]", reads_at_end: bool
    ) -> None:
        self._idle, self._all = idle, everyone
        self._reads_at_end = reads_at_end
        self._unread: list[tuple[float, bytes]] = []
        self._tail = b""
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport
        self._exchange: Exchange | None = None
        self._ended: asyncio.Future[bool]
        self._now_s = 0.0
        self._rest = b""
        self._has_answer = False

    async def run(self, exchange: Exchange, request: bytes) -> bool:
        """Return when it has ended; False when the connection was gone before any answer."""
        self._exchange, self._rest, self._has_answer = exchange, b"", False
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._ended
        finally:
            # Cancelled. By now another exchange may have begun on the connection.
            if self._exchange is exchange:
                self._exchange = None
                self.abort()

    def abort(self) -> None:
        """Close it at once."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods only
        self._all.add(self)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002  the loop's
        """Called by the loop: an answer that had begun is not whole."""
        self._all.discard(self)
        if self in self._idle:
            self._idle.remove(self)
        self._read()
        if self._exchange is not None:
            if self._has_answer:
                self._exchange.error = self._exchange.error or "incomplete"
            self._end(self._has_answer)

    def data_received(self, data: bytes) -> None:
        """Called by the loop: stamp, then read."""
        self._unread.append((time.monotonic(), data))
        self._has_answer = True
        if self._reads_at_end and self._exchange is not None and self._exchange.status == 200:
            self._tail = (self._tail + data)[-len(LAST_CHUNK) :]
            if self._tail != LAST_CHUNK:
                return
        self._read()

    def _read(self) -> None:
        unread, self._unread, self._tail = self._unread, [], b""
        try:
            for self._now_s, data in unread:
                self._parser.feed_data(data)
        except httptools.HttpParserError:  # that of a callback, too
            if self._exchange is not None:
                self._exchange.error = "unreadable"
                self._end(True)
            self._transport.abort()

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        if self._exchange is not None:
            self._exchange.status = self._parser.get_status_code()
            self._exchange.error = "incomplete"

    def on_body(self, body: bytes) -> None:
        """Called by the parser, with each part as it comes."""
        exchange = self._exchange
        if exchange is None:
            return
        if exchange.status != 200:
            self._rest = (self._rest + body)[:ERROR_BYTES]
            return
        lines = (self._rest + body).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._take(exchange, line[5:])

    def on_message_complete(self) -> None:
        """Called by the parser: the next request may use this connection."""
        exchange = self._exchange
        if exchange is None:
            return
        if exchange.status != 200:
            exchange.error = f"{exchange.status} {_name_of(self._rest)}".strip()
        elif exchange.error == "incomplete" and exchange.finish_reason is not None:
            exchange.error = None
        if self._parser.should_keep_alive():
            self._idle.append(self)
        else:
            self._transport.close()
        self._end(True)

    def _take(self, exchange: Exchange, data: bytes) -> None:
        if data.strip() == b"[DONE]":
            return
        chunk = _chunk.decode(data)
        if chunk.error is not None:
            exchange.error = f"stream {chunk.error.name()}"
            return
        made = 0
        for choice in chunk.choices:
            exchange.finish_reason = choice.finish_reason or exchange.finish_reason
            if choice.text or (choice.delta is not None and _has_token(choice.delta)):
                made = 1
        known = len(exchange.token_times_s)
        if chunk.usage is not None:
            # The server's own count: exact, also where a chunk is several tokens, or none.
            made = max(0, chunk.usage.completion_tokens - known)
            exchange.prompt_tokens = chunk.usage.prompt_tokens
        if made:
            exchange.id = chunk.id
            exchange.chunks += 1
            exchange.token_times_s += [self._now_s] * made
        if chunk.aegaeon is not None:
            exchange.figures.update(chunk.aegaeon)

    def _end(self, has_answer: bool) -> None:
        self._exchange = None
        if not self._ended.done():
            self._ended.set_result(has_answer)


def _has_token(delta: _Delta) -> bool:
    return bool(delta.content or delta.reasoning_content or delta.tool_calls is not None)


def _name_of(body: bytes) -> str:
    try:
        return _error_body.decode(body).error.name()
    except msgspec.MsgspecError:
        return ""

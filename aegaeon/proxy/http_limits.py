"""HTTP under the application, with bounds on what the server holds for strangers: until a head is
whole, nobody has shown a key. What is no HTTP gets an answer in the shape of all errors."""

import asyncio
import heapq
import resource
import secrets
from operator import attrgetter
from typing import Any

import msgspec
from starlette.types import Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from aegaeon.config import Settings
from aegaeon.proxy.bodies import BODY_S
from aegaeon.proxy.failures import ApiError
from aegaeon.proxy.metrics import METER, Meter

FREE_FILES = 256  # for all that are no connections
MIN_CONNECTIONS = 64
MOST_DISPLACED = 64  # at once: to find them takes a look at all


class HttpBounds(msgspec.Struct, frozen=True):
    """What one connection may take, and how many there may be."""

    connections: int = 4096
    head_bytes: int = 64 << 10  # of a head, of trailers, of what a chunk is announced by
    head_s: float = 30.0
    message_s: float = BODY_S + 5  # the application gives a body up before that, and says so
    stalled_s: float = 120.0  # for a client that does not read what is sent
    linger_s: float = 2.0  # for one to read why it is refused
    pipelined: int = 16  # requests that came before the answers to earlier ones


def bounds_of(settings: Settings) -> HttpBounds:
    """Return the bounds of a server: connections for twice as many requests as may wait, and some
    more, as far as this process may have files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1024 + 2 * settings.max_waiting * settings.prefilling_count
    if soft != resource.RLIM_INFINITY:
        wanted = min(wanted, soft - FREE_FILES)
    return HttpBounds(connections=max(wanted, MIN_CONNECTIONS))


class BoundedHttp(HttpToolsProtocol):
    """One connection. A client that closes its sending side has gone: its work is cancelled, as
    of one that closes all, which looks the same from here."""

    bounds = HttpBounds()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.is_idle = False
        self.idle_s = 0.0  # since when, by the loop's clock
        self._timer: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._unseen_bytes = 0  # since the parser last told of something: it keeps them
        self._is_in_message = False  # its head is there, its end is not
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Enter it; where there are too many, in the place of the one that is idle longest."""
        super().connection_made(transport)
        if not self._is_room():
            text = f"{self.bounds.connections} connections, all there may be, are busy"
            self._refuse(ApiError(503, "overloaded", f"{text}; try again later"))
            return
        self._rest()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._cancel_timer()
        self._cancel_stalled()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Give the parser only as much as it may keep."""
        most = self.bounds.head_bytes
        while data and not self._is_refused and not self.transport.is_closing():
            room = most - self._unseen_bytes
            part, data = data[:room], data[room:]
            self._unseen_bytes += len(part)
            super().data_received(part)
            if self._unseen_bytes >= most:
                text = f"what comes before or after a body is {most} bytes and more; send less"
                self._refuse(ApiError(431, "headers_too_large", text))

    def on_headers_complete(self) -> None:
        """The application takes it from here. What is raised ends in `send_400_response`."""
        self._unseen_bytes = 0
        if len(self.pipeline) >= self.bounds.pipelined:
            raise ValueError("too many requests without waiting for answers")
        super().on_headers_complete()
        self._is_in_message = True
        self.is_idle = False
        self._expect(self.bounds.message_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header; trailers are nothing that anyone reads."""
        if not self._is_in_message:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """Some of the body."""
        self._unseen_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """From here on the client waits, for however long."""
        self._unseen_bytes = 0
        self._is_in_message = False
        self._cancel_timer()
        super().on_message_complete()
        if self._owes_nothing():
            self._rest()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of one that was answered before its end."""
        has_more = bool(self.pipeline)
        super().on_response_complete()
        if not has_more:
            self._rest()

    def send_400_response(self, msg: str) -> None:
        """Say that this is no HTTP; the parser has given up."""
        self._refuse(ApiError(400, "invalid_http", msg))

    def pause_writing(self) -> None:
        """Have the application wait, but not for ever."""
        super().pause_writing()
        self._cancel_stalled()
        self._stalled = self.loop.call_later(self.bounds.stalled_s, self._drop, "client_stalled")

    def resume_writing(self) -> None:
        """The client reads."""
        super().resume_writing()
        self._cancel_stalled()

    def _unsupported_upgrade_warning(self) -> None:
        """Anybody may ask for an upgrade as often as they like; the log has no place for it."""

    def _is_room(self) -> bool:
        """Whether this one may stay; where there are too many, those that are owed nothing, and
        that for longest, go in its place."""
        if len(self.connections) <= self.bounds.connections:
            return True
        idle = [one for one in self.connections if isinstance(one, BoundedHttp) and one.is_idle]
        gone = heapq.nsmallest(MOST_DISPLACED, idle, key=attrgetter("idle_s"))
        for one in gone:
            self.connections.discard(one)
            one._drop("displaced")
        return bool(gone)

    def _rest(self) -> None:
        """Nothing is owed to the client."""
        self.is_idle, self.idle_s = True, self.loop.time()
        if not self._is_in_message:
            self._expect(self.bounds.head_s)

    def _owes_nothing(self) -> bool:
        is_answered = self.cycle is None or self.cycle.response_complete
        return is_answered and not self.pipeline

    def _expect(self, within_s: float) -> None:
        """Give the client `within_s` for what is to come now."""
        self._cancel_timer()
        self._timer = self.loop.call_later(within_s, self._too_late)

    def _too_late(self) -> None:
        if self._unseen_bytes and not self._is_in_message:
            text = f"no whole head came within {self.bounds.head_s:g} s; send it faster"
            self._refuse(ApiError(408, "request_timeout", text))
        elif self._is_in_message:
            self._drop("request_timeout")
        else:
            self.transport.abort()

    def _drop(self, why: str) -> None:
        """Close without an answer."""
        self._count(why)
        self.transport.abort()

    def _count(self, why: str) -> None:
        # Servers hand what the application's life yields to each connection.
        meter: Meter | None = self.app_state.get(METER)
        if meter is not None:
            meter.dropped(why)

    def _refuse(self, error: ApiError) -> None:
        """Answer with `error`, if an answer is due to what comes in now, and close."""
        self._count(error.code)
        cycle = self.cycle
        is_due = self._owes_nothing()
        if self._is_in_message and not self.pipeline and not cycle.response_started:
            is_due = True
            cycle.disconnected = True  # the application is not to answer as well
            cycle.message_event.set()
        self._is_refused = True
        if not is_due or self.transport.is_closing() or not self.transport.can_write_eof():
            if is_due:
                self.transport.write(_answer(error))
            self.transport.close()
            return
        # What it still sends, if left unread, would have the kernel drop the answer.
        self.transport.write(_answer(error))
        self.transport.write_eof()
        self._cancel_timer()
        self._timer = self.loop.call_later(self.bounds.linger_s, self.transport.abort)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _cancel_stalled(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def bounded_http(bounds: HttpBounds) -> type[BoundedHttp]:
    """Return the protocol with `bounds`, for uvicorn's `http`."""
    return type("BoundedHttp", (BoundedHttp,), {"bounds": bounds})


Wire = tuple[asyncio.Transport, int]  # and its socket


def wire_of(send: Send) -> Wire | None:
    """Return where a begun answer goes whose chunks `send`, the server's, would write as they are;
    None where more is done to them."""
    cycle = getattr(send, "__self__", None)
    if not isinstance(cycle, RequestResponseCycle):
        return None
    if not cycle.chunked_encoding or cycle.scope["method"] == "HEAD" or cycle.disconnected:
        return None
    transport = cycle.transport
    peer = transport.get_extra_info("socket")
    if peer is None or transport.get_extra_info("sslcontext") is not None:
        return None
    return transport, peer.fileno()


def _answer(error: ApiError) -> bytes:
    body = error.body()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "x-request-id": f"req_{secrets.token_hex(12)}",
        **error.headers(),
        "connection": "close",
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return STATUS_LINE[error.status] + lines.encode("ascii") + b"\r\n" + body

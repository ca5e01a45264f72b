"""Traces of requests for OpenTelemetry: noted on the event loop, sent by a thread of its own.

Nothing here is used where no endpoint is configured.
"""

import asyncio
import importlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Protocol
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aegaeon.config import Settings
from aegaeon.errors import ConfigError
from aegaeon.proxy.traces import Trace

log = logging.getLogger(__name__)

TRACE = "aegaeon.trace"  # where a request's scope has it
# What asks models for something. Looking is not worth a trace, and is done all the time.
TRACED = frozenset({"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"})

MAX_WAITING = 1024  # traces; of more the newest are lost
BATCH = 64
INTERVAL_S = 0.5  # in which a batch gathers
OUTAGE_S = 10.0  # between attempts while the collector takes nothing
FLUSH_S = 1.5  # to send the rest at the end; less than the supervisor waits beyond drain_s
MAX_HEADER = 1024  # characters of the client's that are looked at


class Sender(Protocol):
    """Where traces go."""

    def send(self, traces: Sequence[Trace]) -> bool:
        """Send them; False: they are lost."""

    def close(self) -> None:
        """Give up what is being sent."""


class Tracer:
    """Owns the thread that sends, from its making to `close`. A collector that is slow or gone
    costs traces and nothing else."""

    def __init__(self, sender: Sender, outage_s: float = OUTAGE_S) -> None:
        self._sender = sender
        self._outage_s = outage_s
        self._waiting: queue.Queue[Trace] = queue.Queue(MAX_WAITING)
        self._closing = threading.Event()
        self.sent = 0
        self._unsent = 0  # counted by the thread
        self._crowded_out = 0  # by the event loop
        # A daemon: what cannot be sent in time must not keep the process.
        self._thread = threading.Thread(target=self._run, name="aegaeon-traces", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """Traces that were not sent, and will not be."""
        return self._unsent + self._crowded_out

    def counts(self) -> dict[str, int]:
        """Return how many have been sent and lost."""
        return {"sent": self.sent, "lost": self.lost}

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, and trace it."""
        headers = Headers(scope=scope)
        parent, state = (headers.get(name, "") for name in ("traceparent", "tracestate"))
        trace = Trace(scope["method"], scope["path"], parent[:MAX_HEADER], state[:MAX_HEADER])
        scope[TRACE] = trace

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.status = message["status"]
                trace.request_id = Headers(raw=message["headers"]).get("x-request-id", "")
            await send(message)

        try:
            await app(scope, receive, noted)
        finally:
            trace.ended_s = time.monotonic()
            self._take(trace)

    def close(self) -> None:
        """Send what waits and end the thread; blocks for little more than FLUSH_S. Idempotent."""
        self._closing.set()
        self._thread.join(FLUSH_S)
        self._sender.close()
        self._thread.join(FLUSH_S / 4)
        lost = self.lost + self._waiting.qsize()
        if lost:
            log.warning("traces lost count=%d", lost)

    def _take(self, trace: Trace) -> None:
        try:
            self._waiting.put_nowait(trace)
        except queue.Full:
            self._crowded_out += 1

    def _run(self) -> None:
        is_away = False
        while not (self._closing.is_set() and self._waiting.empty()):
            batch = self._batch()
            if not batch:
                continue
            if self._sent(batch):
                self.sent += len(batch)
                is_away = False
                continue
            self._unsent += len(batch)
            if self._closing.is_set():
                return
            if not is_away:
                log.warning("the trace collector takes nothing; traces are lost until it does")
            is_away = True
            self._closing.wait(self._outage_s)

    def _sent(self, batch: list[Trace]) -> bool:
        try:
            return self._sender.send(batch)
        except Exception:  # whatever it is, it must not end the thread
            log.exception("traces not sent")
            return False

    def _batch(self) -> list[Trace]:
        """Return what has come, at the latest after the interval."""
        found: list[Trace] = []
        due_s = time.monotonic() + INTERVAL_S
        while len(found) < BATCH:
            left_s = 0.0 if self._closing.is_set() else max(0.0, due_s - time.monotonic())
            try:
                found.append(self._waiting.get(left_s > 0, left_s))
            except queue.Empty:
                break
        return found


def check_tracing(settings: Settings) -> None:
    """Raise ConfigError where traces are asked for and cannot be made."""
    if settings.trace_endpoint:
        url_of(settings.trace_endpoint)
        _spans()


def url_of(endpoint: str) -> str:
    """Return what traces are posted to: `endpoint`, with the protocol's path where it has none.
    Raises ConfigError."""
    try:
        parts = urlsplit(endpoint)
        is_url = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is none
        is_url = False
    if not is_url:
        raise ConfigError(
            f"--trace-endpoint {endpoint!r} is no URL; give one like http://localhost:4318"
        )
    return endpoint if parts.path.strip("/") else f"{endpoint.rstrip('/')}/v1/traces"


@asynccontextmanager
async def kept_tracer(settings: Settings) -> AsyncIterator[Tracer | None]:
    """Yield the tracer that `settings` ask for, if any; close it. Raises ConfigError."""
    if not settings.trace_endpoint:
        yield None
        return
    tracer = Tracer(_spans().SpanSender(url_of(settings.trace_endpoint)))
    try:
        yield tracer
    finally:
        await asyncio.to_thread(tracer.close)


def _spans() -> ModuleType:
    # Imported where it is wanted: an extra, which takes 0.2 s to import.
    try:
        return importlib.import_module("aegaeon.proxy.spans")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--trace-endpoint needs {error.name}; run: pip install 'aegaeon[otel]'"
        ) from None

"""Answers as server-sent events. A token goes from the instance's record to the socket in one go,
without waking a task, for as long as the client keeps up."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from aegaeon.errors import AegaeonError
from aegaeon.measures import NOT_WAITED
from aegaeon.proxy.answers import (
    DONE,
    PING,
    Answer,
    Figures,
    PromptDetails,
    Usage,
    figures,
    frame,
)
from aegaeon.proxy.choices import Choices
from aegaeon.proxy.failures import ApiError, as_api_error, internal_error
from aegaeon.proxy.http_limits import wire_of
from aegaeon.proxy.lane import Lane
from aegaeon.proxy.outlet import Outlet
from aegaeon.proxy.service import Job, Service
from aegaeon.proxy.transcript import Piece
from aegaeon.proxy.waits import Alarm

log = logging.getLogger(__name__)

# An error this early still gets its proper status; later ones become a frame of the stream.
HEADER_GRACE_S = 0.1
FIRST_PING_S = 0.5
PING_S = 5.0
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
# In a scope: how to reach the server past all middlewares, which only concern headers. A token
# would go through five of them.
SERVER_SEND = "aegaeon.send"
_T = TypeVar("_T")


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


class Tally:
    """Counts what an answer has used so far."""

    def __init__(self, prompt_tokens: int, choices: int) -> None:
        """`choices` are those of each prompt."""
        self._prompt = prompt_tokens
        self._choices = choices
        self._completion = 0
        self._instance = ""
        self._waited = NOT_WAITED
        self._cached: dict[int, int] = {}  # by prompt: of the choice that found least
        self._details = PromptDetails(0)

    @property
    def made(self) -> int:
        """Tokens of all choices."""
        return self._completion

    def add_tokens(self, tokens: int) -> None:
        """Count more of those that a piece was of."""
        self._completion += tokens

    def add(self, piece: Piece) -> None:
        """Count a piece's tokens."""
        self._completion += piece.tokens
        prompt, cached = piece.index // self._choices, piece.cached_tokens
        if prompt not in self._cached or cached < self._cached[prompt]:
            self._cached[prompt] = cached
            self._details = PromptDetails(sum(self._cached.values()))
        self._instance = piece.instance
        if piece.finish_reason is not None:
            self._waited = self._waited.longest(piece.waited)

    @property
    def figures(self) -> Figures:
        """What its choices have waited for."""
        return figures(self._instance, self._waited, self._details.cached_tokens)

    @property
    def usage(self) -> Usage:
        """The usage so far."""
        total = self._prompt + self._completion
        return Usage(self._prompt, self._completion, total, self._details)


class Relay:
    """Takes pieces of choices to a connection: where they come in, and in `run`'s task what the
    connection does not take at once. While it takes nothing, only token ids pile up."""

    def __init__(
        self,
        choices: Choices,
        outlet: Outlet,
        frames: Callable[[Piece], bytes],
        ping_s: float,
        lane: Lane | None = None,
    ) -> None:
        """`frames` makes bytes of a piece, perhaps none; the first ping is at `ping_s` of the
        loop's clock unless something was sent before. What can go by `lane` does."""
        self._choices = choices
        self._outlet = outlet
        self._frames = frames
        self._ping_s = ping_s
        self._alarm = Alarm()
        self._error: Exception | None = None
        self._time = asyncio.get_running_loop().time
        self._lane = lane
        if lane is not None:
            lane.on_failed = self._fail

    async def run(self, first: Piece | None) -> None:
        """Return when all choices have given their last piece and it is sent; `first` is one that
        was taken already. Raises the first error of any, what `frames` and the server raise."""
        try:
            with self._choices.told(self._take):
                self._send_all(b"" if first is None else self._frames(first))
                while not await self._is_through():
                    # Tokens without text, and those of a call that is not whole yet, are nothing
                    # to send.
                    is_woken = await self._alarm.wait(self._ping_due_s)
                    if not is_woken and self._time() >= self._ping_due_s:
                        self._send(PING)
        finally:
            self._alarm.close()
            if self._lane is not None:
                self._lane.close()

    async def _is_through(self) -> bool:
        while self._outlet.is_waiting:
            await self._outlet.finish()
            self._send_all()
        if self._error is not None:
            raise self._error
        return self._choices.is_done

    def _take(self) -> None:
        """Called where pieces come in; errors are the task's."""
        if self._outlet.is_waiting or self._error is not None:
            return
        try:
            is_sent = self._send_all()
        except Exception as error:
            self._error, is_sent = error, False
        if not is_sent or self._error is not None or self._choices.is_done:
            self._alarm.wake()
        elif self._lane is not None:
            self._lane.lend()

    def _send_all(self, body: bytes = b"") -> bool:
        """Send `body` and what is ready; False when it is not all sent."""
        ready, frames = self._choices.ready, self._frames
        try:
            while (piece := ready()) is not None:
                body += frames(piece)
        except Exception as error:
            self._error = error  # of one choice; what came before it is still sent
        return not body or self._send(body)

    def _send(self, body: bytes) -> bool:
        self._ping_s = self._time() + PING_S
        return self._outlet.begin(_part(body))

    @property
    def _ping_due_s(self) -> float:
        if self._lane is None:
            return self._ping_s
        return max(self._ping_s, self._lane.sent_s + PING_S)

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._alarm.wake()


class TokenStream(Response):
    """An answer as server-sent events. Errors before the headers are raised, later ones are a
    frame; either way the stream ends properly. A client that goes away cancels its work."""

    def __init__(self, service: Service, job: Job) -> None:
        # The base class would write headers for a body that we do not have yet.
        self.background = None
        self._service = service
        self._job = job
        options = job.body.stream_options
        self._with_usage = bool(options and options.include_usage)
        self._with_running_usage = bool(options and options.continuous_usage_stats)
        self._answer = Answer(
            "chat" if job.is_chat else "text",
            job.body.model,
            job.id,
            self._with_usage,
            job.bytes_of,
        )
        self._tally = Tally(job.prompt_tokens, job.body.n)
        self._opened: set[int] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        with contextlib.suppress(ClientGone):
            await until_gone(receive, self.run(send, scope.get(SERVER_SEND, send)))

    async def run(self, begin: Send, send: Send) -> None:
        """`begin` takes the headers, `send` the rest. Raises what comes before the headers."""
        async with self._service.choices(self._job) as choices:
            first = await choices.next(HEADER_GRACE_S)
            await begin({"type": "http.response.start", "status": 200, "headers": HEADERS})
            with contextlib.closing(Outlet(send)) as outlet:
                ping_s = asyncio.get_running_loop().time() + FIRST_PING_S - HEADER_GRACE_S
                try:
                    lane = self._lane(choices, send)
                    await Relay(choices, outlet, self._frames, ping_s, lane).run(first)
                    if self._with_usage:
                        await outlet.send(_part(self._answer.usage(self._tally.usage)))
                except (AegaeonError, ApiError) as error:
                    await outlet.send(_part(frame(api_error(error, self._service).body())))
                except OSError:
                    raise ClientGone from None
                except Exception:
                    log.exception("stream failed model=%s", self._job.body.model)
                    await outlet.send(_part(frame(internal_error().body())))
                await outlet.send({"type": "http.response.body", "body": DONE, "more_body": False})

    def _lane(self, choices: Choices, send: Send) -> Lane | None:
        text, wire = choices.only, wire_of(send)
        if text is None or wire is None:
            return None
        relay, has_usage = self._service.gateway.relay, self._with_running_usage
        return Lane(relay, wire, text, self._answer, self._tally, has_usage)

    def _frames(self, piece: Piece) -> bytes:
        self._tally.add(piece)
        opening = b""
        if piece.index not in self._opened:
            self._opened.add(piece.index)
            opening = self._answer.opening(piece.index)
        if not (piece.text or piece.calls) and piece.finish_reason is None:
            # Tokens of which no text is certain yet.
            return opening
        usage = self._tally.usage if self._with_running_usage else None
        frames = self._answer.piece(piece, usage)
        return opening + frames if opening else frames


async def until_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Run `work` to its end, or cancel it and raise ClientGone when the client goes away."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _part(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}


def api_error(error: Exception, service: Service) -> ApiError:
    """Return what a client is told of `error`."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, AegaeonError):
        log.info("request failed code=%s error=%s", error.code, error)
        return as_api_error(error, service.gateway.retry_after_s(error))
    return internal_error()

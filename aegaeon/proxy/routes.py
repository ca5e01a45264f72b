"""The HTTP routes: read a body, let the service do it, write the answer whole or as a stream."""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar

import msgspec
from fastapi import FastAPI
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from aegaeon.errors import AegaeonError
from aegaeon.measures import NOT_WAITED
from aegaeon.proxy.admin import add_admin_routes
from aegaeon.proxy.answers import (
    DONE,
    PING,
    Answer,
    Figures,
    Live,
    ModelList,
    PromptDetails,
    Text,
    Usage,
    figures,
    frame,
)
from aegaeon.proxy.choices import Choices
from aegaeon.proxy.failures import ApiError, as_api_error, internal_error, invalid
from aegaeon.proxy.guard import CALLER, Caller, error_response
from aegaeon.proxy.limits import read_json_body
from aegaeon.proxy.openai import parse_chat, parse_completion
from aegaeon.proxy.service import Job, Service
from aegaeon.proxy.tokenize import parse_detokenize, parse_tokenize
from aegaeon.proxy.tools import Call
from aegaeon.proxy.tracing import TRACE
from aegaeon.proxy.transcript import Piece, TokenScore

log = logging.getLogger(__name__)

# An error this early still gets its proper status; later ones become a frame of the stream.
HEADER_GRACE_S = 0.1
DEFAULT_DECISIONS, MAX_DECISIONS = 200, 1000  # in an answer
FIRST_PING_S = 0.5
PING_S = 5.0
_WHOLE_WAIT_S = 5.0
_STREAM_HEADERS = [
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


def add_routes(app: FastAPI) -> None:
    """Enter all routes; they find the service in `app.state.service`."""
    add = app.add_api_route
    add("/v1/chat/completions", chat_completions, methods=["POST"], response_model=None)
    add("/v1/completions", completions, methods=["POST"], response_model=None)
    add("/tokenize", tokens_of_text, methods=["POST"], response_model=None)
    add("/detokenize", text_of_tokens, methods=["POST"], response_model=None)
    look = ["GET", "HEAD"]
    add("/v1/models", models, methods=look, response_model=None)
    add("/v1/models/{model:path}", model, methods=look, response_model=None)
    add_admin_routes(app)
    add("/admin/decisions", decisions, methods=look, response_model=None)
    add("/admin/status", status, methods=look, response_model=None)
    add("/metrics", metrics, methods=look, response_model=None)
    add("/health", health, methods=look, response_model=None)
    add("/health/live", live, methods=look, response_model=None)
    add("/health/ready", ready, methods=look, response_model=None)


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions."""
    service = _service(request)
    body = parse_chat(await _body(request, service))
    _caller(request).check_model(service.names_of(body.model))
    return await _answer(request, service, await service.chat(body, _asker(request)))


async def completions(request: Request) -> Response:
    """POST /v1/completions."""
    service = _service(request)
    body = parse_completion(await _body(request, service))
    _caller(request).check_model(service.names_of(body.model))
    return await _answer(request, service, await service.complete(body))


async def tokens_of_text(request: Request) -> Response:
    """POST /tokenize."""
    service = _service(request)
    body = parse_tokenize(await _body(request, service))
    _caller(request).check_model(service.names_of(body.model))
    return _json(await service.tokenize(body))


async def text_of_tokens(request: Request) -> Response:
    """POST /detokenize."""
    service = _service(request)
    body = parse_detokenize(await _body(request, service))
    _caller(request).check_model(service.names_of(body.model))
    return _json(await service.detokenize(body))


async def models(request: Request) -> Response:
    """GET /v1/models: those that the caller may use."""
    found, caller = _service(request).models(), _caller(request)
    cards = [card for card in found.data if caller.may_use((card.id, *card.aliases))]
    return _json(ModelList(data=cards))


async def model(request: Request) -> Response:
    """GET /v1/models/{id}; ids may contain slashes."""
    asked = request.path_params["model"]
    service = _service(request)
    _caller(request).check_model(service.names_of(asked))
    return _json(service.model(asked))


async def health(request: Request) -> Response:
    """GET /health: 200 while some instance takes requests. What they do is for those who may know
    what is served."""
    report, caller = _service(request).health(), _caller(request)
    if not (caller.may("metrics") or caller.may("admin")):
        report = msgspec.structs.replace(report, instances=[], complaint=None)
    return _json(report, status=200 if report.status == "ok" else 503)


async def live(request: Request) -> Response:  # noqa: ARG001  that it answers is the answer
    """GET /health/live: 200 while this process's loop turns."""
    return _json(Live())


async def ready(request: Request) -> Response:
    """GET /health/ready: 200 while a request sent now would be served; asks the instances, and
    waits for their answers up to two seconds."""
    report = await _service(request).ready()
    return _json(report, status=200 if report.status == "ready" else 503)


async def metrics(request: Request) -> Response:
    """GET /metrics: what has been counted, in the text that the caller reads."""
    _, kind = choose_encoder(request.headers.get("accept", ""))
    body = _service(request).metrics(is_openmetrics="openmetrics" in kind)
    return Response(body, headers={"content-type": kind})


async def status(request: Request) -> Response:
    """GET /admin/status: what goes on, of late and now."""
    return _json(_service(request).status())


async def decisions(request: Request) -> Response:
    """GET /admin/decisions?request=ID&instance=ID&limit=N: what was decided lately, and why."""
    asked = request.query_params
    unknown = sorted(set(asked) - {"request", "instance", "limit"})
    if unknown:
        raise invalid(unknown[0], f"there is no {unknown[0]!r}; ask by request, instance, limit")
    limit = asked.get("limit", str(DEFAULT_DECISIONS))
    if not limit.isdecimal() or len(limit) > 4 or not 1 <= int(limit) <= MAX_DECISIONS:
        raise invalid("limit", f"limit must be from 1 to {MAX_DECISIONS}, not {limit!r}")
    explain = _service(request).explain
    return _json(await explain(asked.get("request"), asked.get("instance"), int(limit)))


def _asker(request: Request) -> str:
    """Who asks, as far as it can be told: by the key or, without, by the address."""
    key = _caller(request).key
    if key is not None:
        return f"key {key.name}"
    return f"address {request.client.host if request.client is not None else ''}"


async def _body(request: Request, service: Service) -> bytes:
    if service.is_draining:
        wait_s = service.settings.drain_s
        raise ApiError(503, "draining", "the server is about to stop", retry_after_s=wait_s)
    return await read_json_body(request, service.settings.max_body_bytes)


async def _answer(request: Request, service: Service, job: Job) -> Response:
    job = job.asked_with(_caller(request).key).traced(request.scope.get(TRACE))
    if job.body.stream:
        return TokenStream(service, job)
    try:
        body = await until_gone(request.receive, _whole(service, job))
    except ClientGone:
        return Response(status_code=499)
    return Response(body, media_type="application/json")


async def _whole(service: Service, job: Job) -> bytes:
    count = len(job.generations)
    texts: list[list[str]] = [[] for _ in range(count)]
    scores: list[list[TokenScore]] = [[] for _ in range(count)]
    calls: list[list[Call]] = [[] for _ in range(count)]
    done: list[Text | None] = [None] * count
    tally = Tally(job.prompt_tokens, job.body.n or 1)
    async with service.choices(job) as choices:
        while not choices.is_done:
            piece = await choices.next(_WHOLE_WAIT_S)
            if piece is None:
                continue
            tally.add(piece)
            texts[piece.index].append(piece.text)
            scores[piece.index] += piece.scores
            calls[piece.index] += piece.calls
            if piece.finish_reason is not None:
                lists = tuple(scores[piece.index]), tuple(calls[piece.index])
                done[piece.index] = Text("".join(texts[piece.index]), piece.finish_reason, *lists)
    kind: Literal["chat", "text"] = "chat" if job.is_chat else "text"
    answer = Answer(kind, job.body.model, job.id, bytes_of=job.bytes_of)
    return answer.whole([text for text in done if text is not None], tally.usage, tally.figures)


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

    def add(self, piece: Piece) -> None:
        """Count a piece's tokens."""
        self._completion += piece.tokens
        prompt, cached = piece.index // self._choices, piece.cached_tokens
        self._cached[prompt] = min(cached, self._cached.get(prompt, cached))
        self._instance = piece.instance
        if piece.finish_reason is not None:
            self._waited = self._waited.longest(piece.waited)

    @property
    def figures(self) -> Figures:
        """What its choices have waited for."""
        return figures(self._instance, self._waited, sum(self._cached.values()))

    @property
    def usage(self) -> Usage:
        """The usage so far."""
        total, cached = self._prompt + self._completion, sum(self._cached.values())
        return Usage(self._prompt, self._completion, total, PromptDetails(cached))


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
        self._tally = Tally(job.prompt_tokens, job.body.n or 1)
        self._opened: set[int] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        with contextlib.suppress(ClientGone):
            await until_gone(receive, self._run(send, scope.get(SERVER_SEND, send)))

    async def _run(self, begin: Send, send: Send) -> None:
        """`begin` takes the headers, `send` the rest."""
        async with self._service.choices(self._job) as choices:
            first = await choices.next(HEADER_GRACE_S)
            await begin({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
            try:
                await self._send_all(choices, first, send)
                if self._with_usage:
                    await _send_part(send, self._answer.usage(self._tally.usage))
            except (AegaeonError, ApiError) as error:
                await _send_part(send, frame(_api_error(error, self._service).body()))
            except OSError:
                raise ClientGone from None
            except Exception:
                log.exception("stream failed model=%s", self._job.body.model)
                await _send_part(send, frame(internal_error().body()))
            await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _send_all(self, choices: Choices, first: Piece | None, send: Send) -> None:
        """Send all there is, and a ping where there has been nothing for long: tokens without text,
        and those of a call that is not whole yet, are nothing to send."""
        now = asyncio.get_running_loop().time
        piece, ping_s = first, now() + FIRST_PING_S - HEADER_GRACE_S
        while True:
            parts = [] if piece is None else [self._frames(piece)]
            while piece is not None and (more := choices.ready()) is not None:
                parts.append(self._frames(more))
            body = b"".join(parts) or (PING if now() >= ping_s else b"")
            if body:
                await _send_part(send, body)
                ping_s = now() + PING_S
            if choices.is_done:
                return
            piece = await choices.next(max(ping_s - now(), 0.001))

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
        return opening + self._answer.piece(piece, usage)


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


async def _send_part(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


def handle_errors(app: FastAPI) -> None:
    """Give every error its OpenAI shape: ours, unknown paths and wrong methods."""

    async def on_error(request: Request, error: Exception) -> Response:
        return error_response(_api_error(error, _service(request)))

    app.add_exception_handler(ApiError, on_error)
    app.add_exception_handler(AegaeonError, on_error)


def _api_error(error: Exception, service: Service) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, AegaeonError):
        log.info("request failed code=%s error=%s", error.code, error)
        return as_api_error(error, service.gateway.retry_after_s(error))
    return internal_error()


def _json(value: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _caller(request: Request) -> Caller:
    caller: Caller = request.scope[CALLER]
    return caller


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service

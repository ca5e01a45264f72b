"""The HTTP routes: read a body, let the service do it, write the answer whole or as a stream."""

from collections.abc import Coroutine
from typing import Any, Literal, TypeAlias

import msgspec
from fastapi import FastAPI
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

from aegaeon.errors import AegaeonError
from aegaeon.proxy.admin import add_admin_routes
from aegaeon.proxy.answers import Answer, Live, ModelList, Text
from aegaeon.proxy.bodies import Bodies
from aegaeon.proxy.failures import ApiError, invalid
from aegaeon.proxy.guard import CALLER, Caller, error_response, json_response
from aegaeon.proxy.late import stream_of
from aegaeon.proxy.openai import parse_chat, parse_completion
from aegaeon.proxy.service import Job, Service
from aegaeon.proxy.streams import ClientGone, Tally, api_error, until_gone
from aegaeon.proxy.tokenize import parse_detokenize, parse_tokenize
from aegaeon.proxy.tools import Call
from aegaeon.proxy.tracing import TRACE
from aegaeon.proxy.transcript import TokenScore
from aegaeon.types import ModelId

DEFAULT_DECISIONS, MAX_DECISIONS = 200, 1000  # in an answer
_WHOLE_WAIT_S = 5.0
Preparing: TypeAlias = Coroutine[Any, Any, Job]


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
    return await _answer(request, service, *await _chat(request, service))


async def completions(request: Request) -> Response:
    """POST /v1/completions."""
    service = _service(request)
    return await _answer(request, service, *await _completion(request, service))


async def tokens_of_text(request: Request) -> Response:
    """POST /tokenize."""
    service = _service(request)
    body = parse_tokenize(await _body(request, service))
    _caller(request).check_model(service.names_of(body.model))
    return json_response(await service.tokenize(body))


async def text_of_tokens(request: Request) -> Response:
    """POST /detokenize."""
    service = _service(request)
    body = parse_detokenize(await _body(request, service))
    _caller(request).check_model(service.names_of(body.model))
    return json_response(await service.detokenize(body))


async def models(request: Request) -> Response:
    """GET /v1/models: those that the caller may use."""
    found, caller = _service(request).models(), _caller(request)
    cards = [card for card in found.data if caller.may_use((card.id, *card.aliases))]
    return json_response(ModelList(data=cards))


async def model(request: Request) -> Response:
    """GET /v1/models/{id}; ids may contain slashes."""
    asked = request.path_params["model"]
    service = _service(request)
    _caller(request).check_model(service.names_of(asked))
    return json_response(service.model(asked))


async def health(request: Request) -> Response:
    """GET /health: 200 while some instance takes requests. What they do is for those who may know
    what is served."""
    report, caller = _service(request).health(), _caller(request)
    if not (caller.may("metrics") or caller.may("admin")):
        report = msgspec.structs.replace(report, instances=[], complaint=None)
    return json_response(report, status=200 if report.status == "ok" else 503)


async def live(request: Request) -> Response:  # noqa: ARG001  that it answers is the answer
    """GET /health/live: 200 while this process's loop turns."""
    return json_response(Live())


async def ready(request: Request) -> Response:
    """GET /health/ready: 200 while a request sent now would be served; asks the instances, and
    waits for their answers up to two seconds."""
    report = await _service(request).ready()
    return json_response(report, status=200 if report.status == "ready" else 503)


async def metrics(request: Request) -> Response:
    """GET /metrics: what has been counted, in the text that the caller reads."""
    _, kind = choose_encoder(request.headers.get("accept", ""))
    body = _service(request).metrics(is_openmetrics="openmetrics" in kind)
    return Response(body, headers={"content-type": kind})


async def status(request: Request) -> Response:
    """GET /admin/status: what goes on, of late and now."""
    return json_response(_service(request).status())


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
    return json_response(await explain(asked.get("request"), asked.get("instance"), int(limit)))


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
    bodies: Bodies = request.app.state.bodies
    key = _caller(request).key
    most = service.settings.max_body_bytes
    return await bodies.read(request, most, "" if key is None else key.name)


# Bodies end with the preparation: an answer that lasts for minutes keeps none of it.


async def _chat(request: Request, service: Service) -> tuple[ModelId | None, Preparing]:
    body = parse_chat(await _body(request, service))
    _caller(request).check_model(service.names_of(body.model))
    return (body.model if body.stream else None), service.chat(body, _asker(request))


async def _completion(request: Request, service: Service) -> tuple[ModelId | None, Preparing]:
    body = parse_completion(await _body(request, service))
    _caller(request).check_model(service.names_of(body.model))
    return (body.model if body.stream else None), service.complete(body)


async def _answer(
    request: Request, service: Service, streamed: ModelId | None, preparing: Preparing
) -> Response:
    """`streamed` is of which model a stream is asked for, if one is."""
    prepared = _owned(request, preparing)
    if streamed is not None:
        return await stream_of(service, streamed, prepared)
    try:
        body = await until_gone(request.receive, _whole(service, prepared))
    except ClientGone:
        return Response(status_code=499)
    return Response(body, media_type="application/json")


async def _owned(request: Request, preparing: Preparing) -> Job:
    """Return what is prepared as what this caller asked, and part of this trace."""
    job = await preparing
    return job.asked_with(_caller(request).key).traced(request.scope.get(TRACE))


async def _whole(service: Service, prepared: Preparing) -> bytes:
    job = await prepared
    count = len(job.generations)
    texts: list[list[str]] = [[] for _ in range(count)]
    scores: list[list[TokenScore]] = [[] for _ in range(count)]
    calls: list[list[Call]] = [[] for _ in range(count)]
    done: list[Text | None] = [None] * count
    tally = Tally(job.prompt_tokens, job.body.n)
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


def handle_errors(app: FastAPI) -> None:
    """Give every error its OpenAI shape: ours, unknown paths and wrong methods."""

    async def on_error(request: Request, error: Exception) -> Response:
        return error_response(api_error(error, _service(request)))

    app.add_exception_handler(ApiError, on_error)
    app.add_exception_handler(AegaeonError, on_error)


def _caller(request: Request) -> Caller:
    caller: Caller = request.scope[CALLER]
    return caller


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service

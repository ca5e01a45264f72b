"""What the routes take and give, as an OpenAPI document made of the records themselves."""

from functools import cache
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from aegaeon import __version__
from aegaeon.config import ModelSettings
from aegaeon.explanations import Explanation
from aegaeon.proxy.answers import (
    Answered,
    ChatChoice,
    Health,
    Live,
    ModelCard,
    ModelList,
    Ready,
    TextChoice,
)
from aegaeon.proxy.failures import ErrorBody
from aegaeon.proxy.guard import NEEDS
from aegaeon.proxy.models import ModelChange
from aegaeon.proxy.openai import ChatBody, CompletionBody
from aegaeon.proxy.status import Status
from aegaeon.proxy.tokenize import DetokenizeBody, Detokenized, TokenizeBody, Tokenized

PATH = "/openapi.json"
STREAM, TEXT = "text/event-stream", "text/plain"


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one path: what it takes, what it gives with which status."""

    path: str
    method: str
    summary: str
    takes: type | None = None
    gives: type | None = None
    status: int = 200
    query: tuple[str, ...] = ()
    other: str = ""  # a media type that it may give instead of JSON


OPERATIONS = (
    Operation(path="/v1/chat/completions", method="post", summary="Answer a conversation",
              takes=ChatBody, gives=Answered[ChatChoice], other=STREAM),
    Operation(path="/v1/completions", method="post", summary="Go on with a text",
              takes=CompletionBody, gives=Answered[TextChoice], other=STREAM),
    Operation(path="/v1/models", method="get", summary="List the served models", gives=ModelList),
    Operation(path="/v1/models/{model}", method="get", summary="One model", gives=ModelCard),
    Operation(path="/tokenize", method="post", summary="Count the tokens of a text",
              takes=TokenizeBody, gives=Tokenized),
    Operation(path="/detokenize", method="post", summary="The text of tokens",
              takes=DetokenizeBody, gives=Detokenized),
    Operation(path="/health", method="get", summary="How the instances are", gives=Health),
    Operation(path="/health/live", method="get", summary="The process responds", gives=Live),
    Operation(path="/health/ready", method="get", summary="Requests would be served", gives=Ready),
    Operation(path="/metrics", method="get", summary="Figures for Prometheus", other=TEXT),
    Operation(path="/admin/decisions", method="get", summary="What was decided, and why",
              gives=Explanation, query=("request", "instance", "limit")),
    Operation(path="/admin/status", method="get", summary="What goes on now", gives=Status),
    Operation(path="/admin/models", method="post", summary="Serve one model more",
              takes=ModelSettings, gives=ModelChange, status=201),
    Operation(path="/admin/models/{model}", method="delete", summary="Drain a model and remove it",
              gives=ModelChange, status=202),
    Operation(path="/admin/models/{model}/load", method="post", summary="Bring a model in",
              gives=ModelChange, status=202),
    Operation(path="/admin/models/{model}/pin", method="post", summary="Keep a model loaded",
              gives=ModelChange),
    Operation(path="/admin/models/{model}/unpin", method="post", summary="Let a model go again",
              gives=ModelChange),
)  # fmt: skip


def add_document(app: FastAPI) -> None:
    """Enter the route of the document."""
    app.add_api_route(PATH, document, methods=["GET", "HEAD"], response_model=None)


async def document(request: Request) -> Response:  # noqa: ARG001  the same for all
    """GET /openapi.json."""
    return Response(msgspec.json.encode(describe()), media_type="application/json")


@cache
def describe() -> dict[str, Any]:
    """Return the document."""
    kinds = [ErrorBody, *(k for one in OPERATIONS for k in (one.takes, one.gives) if k is not None)]
    schemas, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    by_kind = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for one in OPERATIONS:
        paths.setdefault(one.path, {})[one.method] = _told(one, by_kind)
    return {
        "openapi": "3.1.0",
        "info": {"title": "aegaeon", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _told(one: Operation, by_kind: dict[type, dict[str, Any]]) -> dict[str, Any]:
    content = {"application/json": {"schema": by_kind[one.gives]}} if one.gives else {}
    if one.other:
        content[one.other] = {"schema": {"type": "string"}}
    told: dict[str, Any] = {
        "summary": one.summary,
        "operationId": f"{one.method}{one.path.translate(_PLAIN)}",
        "responses": {
            str(one.status): {"description": one.summary, "content": content},
            "default": {
                "description": "An error, in OpenAI's shape",
                "content": {"application/json": {"schema": by_kind[ErrorBody]}},
            },
        },
    }
    if one.takes is not None:
        body = {"application/json": {"schema": by_kind[one.takes]}}
        told["requestBody"] = {"required": True, "content": body}
    given = [("model", "path")] if "{model}" in one.path else []
    given += [(name, "query") for name in one.query]
    if given:
        told["parameters"] = [
            {"name": name, "in": place, "required": place == "path", "schema": {"type": "string"}}
            for name, place in given
        ]
    if need(one.path) != "public":
        told["security"] = [{"key": []}]
    return told


def need(path: str) -> str:
    """Return the scope that a key needs for `path`, as it stands in the document."""
    return NEEDS[path.replace("{model}", "{model:path}")]


_PLAIN = str.maketrans({"/": "_", "{": None, "}": None})

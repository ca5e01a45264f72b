"""The routes of administrators: models come, are pinned and go."""

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from aegaeon.config import ModelSettings
from aegaeon.errors import Draining
from aegaeon.proxy.bodies import Bodies
from aegaeon.proxy.failures import ApiError, invalid
from aegaeon.proxy.guard import json_response
from aegaeon.proxy.models import Models

MAX_BODY_BYTES = 64 << 10


def add_admin_routes(app: FastAPI) -> None:
    """Enter the routes; they find the models in `app.state.models`."""
    add = app.add_api_route
    one = "/admin/models/{model:path}"
    add("/admin/models", add_model, methods=["POST"], response_model=None)
    add(f"{one}/load", load_model, methods=["POST"], response_model=None)
    add(f"{one}/pin", pin_model, methods=["POST"], response_model=None)
    add(f"{one}/unpin", unpin_model, methods=["POST"], response_model=None)
    add(one, remove_model, methods=["DELETE"], response_model=None)


async def add_model(request: Request) -> Response:
    """POST /admin/models: serve a model of the models directory, too."""
    bodies: Bodies = request.app.state.bodies
    asked = _decoded(await bodies.read(request, MAX_BODY_BYTES))
    return json_response(await _models(request).add(asked), 201)


async def remove_model(request: Request) -> Response:
    """DELETE /admin/models/{id}: no new requests; it goes when the last one has ended."""
    return json_response(await _models(request).remove(request.path_params["model"]), 202)


async def load_model(request: Request) -> Response:
    """POST /admin/models/{id}/load: have it brought in, where it fits."""
    return json_response(await _models(request).load(request.path_params["model"]), 202)


async def pin_model(request: Request) -> Response:
    """POST /admin/models/{id}/pin: have it loaded, and making room for no other."""
    return json_response(await _models(request).pin(request.path_params["model"], True))


async def unpin_model(request: Request) -> Response:
    """POST /admin/models/{id}/unpin."""
    return json_response(await _models(request).pin(request.path_params["model"], False))


def _decoded(raw: bytes) -> ModelSettings:
    try:
        return msgspec.json.decode(raw, type=ModelSettings)
    except msgspec.ValidationError as error:
        raise invalid(None, str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {error}") from None


def _models(request: Request) -> Models:
    if request.app.state.service.is_draining:
        raise Draining("the server is about to stop, and what it serves with it")
    models: Models = request.app.state.models
    return models

"""The ASGI application: error shapes, request ids, and the life of gateway and instances."""

import contextlib
import logging
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aegaeon import __version__
from aegaeon.config import Settings, load_settings
from aegaeon.errors import AegaeonError
from aegaeon.logs import REQUEST_ID
from aegaeon.models.references import served_models
from aegaeon.proxy.bodies import Bodies
from aegaeon.proxy.failures import ApiError, internal_error
from aegaeon.proxy.gateway import Gateway
from aegaeon.proxy.guard import Guard, error_response, is_loopback
from aegaeon.proxy.metrics import METER, Meter
from aegaeon.proxy.models import Models
from aegaeon.proxy.node import joined_domain, started_gateway
from aegaeon.proxy.openapi import add_document
from aegaeon.proxy.page import add_page
from aegaeon.proxy.reload import kept_keys, kept_models
from aegaeon.proxy.residue import keep_for_good, without_residue
from aegaeon.proxy.routes import add_routes, handle_errors
from aegaeon.proxy.service import Service
from aegaeon.proxy.streams import SERVER_SEND
from aegaeon.proxy.tracing import TRACED, Tracer, kept_tracer
from aegaeon.store.base import Domain
from aegaeon.types import ModelSpec

log = logging.getLogger(__name__)

_OPTIONS: dict[str, Any] = {"openapi_url": None, "redirect_slashes": False}
OF_BODIES = 1 / 4  # of what prompts may hold: for bodies that are on their way
_CLEAN_ID = re.compile(r"[\x21-\x7e]{1,128}")


def create_app(
    settings: Settings | None = None,
    specs: tuple[ModelSpec, ...] | None = None,
    domain: Domain | None = None,
    address: str | None = None,
) -> FastAPI:
    """Build the application. What is not given is found out when it starts: settings from
    AEGAEON_* and AEGAEON_CONFIG, the models they name, a domain: the live one, or a new one with
    instances that belong to this application; and a mailbox address."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Meter]]:
        chosen = settings or load_settings()
        served = specs or served_models(chosen)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(without_residue())
            app.state.is_loopback = is_loopback(chosen.host)
            app.state.tracer = await stack.enter_async_context(kept_tracer(chosen))
            app.state.keys = await stack.enter_async_context(kept_keys(chosen))
            joined = domain if domain else await stack.enter_async_context(joined_domain(chosen))
            gateway = await started_gateway(lambda: Gateway(joined, chosen, served, address))
            stack.push_async_callback(gateway.close)
            _begin_counting(app, gateway.meter)
            service = Service(chosen, served, gateway, int(time.time()))
            stack.push_async_callback(service.close)
            service.warm()
            store = joined.catalog()
            await stack.enter_async_context(kept_models(service, store))
            app.state.models, app.state.service = Models(chosen, store, service), service
            app.state.bodies = Bodies(lambda: service.settings.max_open_mb * 1e6 * OF_BODIES)
            if settings is None:  # a server's own, which serves nothing else
                keep_for_good()
            yield {METER: gateway.meter}

    app = _Application(title="aegaeon", version=__version__, lifespan=lifespan, **_OPTIONS)
    return _with_routes(app)


def _begin_counting(app: FastAPI, meter: Meter) -> None:
    if app.state.tracer is not None:
        meter.follow_traces(app.state.tracer.counts)
    if getattr(app.state, "was_hung", False):
        meter.was_hung()


def _with_routes(app: FastAPI) -> FastAPI:
    add_routes(app)
    add_page(app)
    add_document(app)
    app.add_middleware(Guard)
    handle_errors(app)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_middleware(RequestIds)
    return app


class _Application(FastAPI):
    """Notes the server's own `send`, for streams; has the tracer, if any, see all of a request."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        scope[SERVER_SEND] = send
        tracer: Tracer | None = getattr(self.state, "tracer", None)
        if tracer is None or scope.get("path") not in TRACED or scope["type"] != "http":
            await super().__call__(scope, receive, send)
        else:
            await tracer.serve(super().__call__, scope, receive, send)


class RequestIds:
    """Puts x-request-id on every response, the client's own if it sent a clean one, and turns an
    error that nobody caught into a 500 without internals."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await _start_plainly(self._app, scope, receive, send)
            return
        theirs = Headers(scope=scope).get("x-request-id", "")
        request_id = theirs if _CLEAN_ID.fullmatch(theirs) else f"req_{secrets.token_hex(12)}"
        is_started = False
        token = REQUEST_ID.set(request_id)

        async def send_with_id(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
                _count(scope, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("request failed request_id=%s path=%s", request_id, scope["path"])
            if not is_started:
                await error_response(internal_error())(scope, receive, send_with_id)
        finally:
            REQUEST_ID.reset(token)


def _count(scope: Scope, status: int) -> None:
    """Count an answer by its route; paths that nobody entered are one."""
    service: Service | None = getattr(scope["app"].state, "service", None)
    if service is not None:
        route = getattr(scope.get("route"), "path", "none")
        service.gateway.meter.responded(route, status)


async def _start_plainly(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run the application's life. When it cannot start, say why in one line, not a traceback."""

    async def send_plainly(message: Message) -> None:
        if message["type"] == "lifespan.startup.failed":
            error = sys.exc_info()[1]
            if isinstance(error, AegaeonError):
                message = {**message, "message": f"cannot start: {error}"}
        await send(message)

    # The server has been told; it prints whatever is raised on top of that.
    with contextlib.suppress(AegaeonError):
        await app(scope, receive, send_plainly)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path}"
    match error.status_code:
        case 404:
            found = ApiError(404, "not_found", f"there is no {path}; the routes start with /v1/")
        case 405:
            found = ApiError(405, "method_not_allowed", f"{path} is not allowed")
        case status:
            found = ApiError(status, "http_error", str(error.detail))
    response = error_response(found)
    response.headers.update(error.headers or {})
    return response

"""Streams of models whose tokenizers are being read: the client has its headers and pings
meanwhile."""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from aegaeon.errors import AegaeonError
from aegaeon.proxy.answers import DONE, PING, frame
from aegaeon.proxy.failures import ApiError, internal_error
from aegaeon.proxy.outlet import Outlet
from aegaeon.proxy.service import Job, Service
from aegaeon.proxy.streams import (
    HEADERS,
    PING_S,
    SERVER_SEND,
    ClientGone,
    TokenStream,
    api_error,
    until_gone,
)
from aegaeon.types import ModelId

log = logging.getLogger(__name__)

GRACE_S = 0.5  # in which the client waits for its headers; errors have a status until then
LOOK_S = 0.05


async def stream_of(
    service: Service, model: ModelId, preparing: Coroutine[Any, Any, Job]
) -> Response:
    """Return the stream of what is prepared for `model`. Errors are raised, as is what ends this,
    but for those of a model whose tokenizer is long in coming: they are a frame of the stream."""
    task = asyncio.ensure_future(preparing)
    clock = asyncio.get_running_loop().time
    give_up_s = clock() + GRACE_S
    try:
        while not (task.done() or service.has_text(model)) and clock() < give_up_s:
            await asyncio.wait({task}, timeout=LOOK_S)
        if task.done() or service.has_text(model):
            return TokenStream(service, await task)
    except BaseException:
        task.cancel()
        raise
    return LateStream(service, task)


class LateStream(Response):
    """A stream that begins before its request is ready."""

    def __init__(self, service: Service, preparing: "asyncio.Future[Job]") -> None:
        # The base class would write headers for a body that we do not have yet.
        self.background = None
        self._service = service
        self._preparing = preparing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. A client that goes away ends the preparation, too."""
        try:
            with contextlib.suppress(ClientGone):
                await until_gone(receive, self._run(send, scope.get(SERVER_SEND, send)))
        finally:
            self._preparing.cancel()

    async def _run(self, begin: Send, send: Send) -> None:
        await begin({"type": "http.response.start", "status": 200, "headers": HEADERS})
        try:
            with contextlib.closing(Outlet(send)) as outlet:
                await self._prepared(outlet)
            await TokenStream(self._service, self._preparing.result()).run(_begun, send)
            return
        except (AegaeonError, ApiError) as error:
            body = frame(api_error(error, self._service).body())
        except OSError:
            raise ClientGone from None
        except Exception:
            log.exception("stream failed while it was prepared")
            body = frame(internal_error().body())
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _prepared(self, outlet: Outlet) -> None:
        while not self._preparing.done():
            await outlet.send({"type": "http.response.body", "body": PING, "more_body": True})
            await asyncio.wait({self._preparing}, timeout=PING_S)


async def _begun(_: Message) -> None:
    """The headers are with the client already."""

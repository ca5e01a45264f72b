"""The proxy process under a supervisor: settings and models as JSON on stdin, then HTTP until
SIGTERM, which lets open answers end and refuses new requests."""

import asyncio
import logging
import signal
import sys
from socket import socket
from types import FrameType

import msgspec
import uvicorn

from aegaeon._native import die_with_parent
from aegaeon.config import Settings
from aegaeon.proxy.application import create_app
from aegaeon.proxy.service import Service
from aegaeon.store.domains import open_domain
from aegaeon.types import ModelSpec

log = logging.getLogger(__name__)

_POLL_S = 0.05


class WorkerInput(msgspec.Struct, frozen=True):
    """What the supervisor writes to stdin."""

    settings: Settings
    specs: tuple[ModelSpec, ...]


class DrainingServer(uvicorn.Server):
    """uvicorn, but the first signal drains: requests after it get a 503, open ones end."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self._settings = settings
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Listen, and say so in the log."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if not self.should_exit:
            log.info("ready host=%s port=%d", self._settings.host, self._settings.port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On the first signal drain; on the second end at once."""
        if self._loop is None or self._drain is not None:
            super().handle_exit(sig, frame)
            return
        self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        if self._drain is None:
            self._drain = asyncio.ensure_future(self._drained())

    async def _drained(self) -> None:
        service: Service = self.config.loaded_app.state.service
        service.is_draining = True
        log.info("draining open_requests=%d", service.gateway.open_requests)
        waited_s = 0.0
        while service.gateway.open_requests and waited_s < self._settings.drain_s:
            await asyncio.sleep(_POLL_S)
            waited_s += _POLL_S
        self.should_exit = True


def main() -> int:
    """Serve until told to stop; returns the process's exit status."""
    die_with_parent(signal.SIGTERM)
    given = msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerInput)
    settings = given.settings
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(levelname)s proxy %(name)s %(message)s"
    )
    domain = open_domain(settings)
    config = uvicorn.Config(
        create_app(settings, given.specs, domain),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=max(1, int(settings.drain_s)),
    )
    server = DrainingServer(config, settings)
    try:
        server.run()
    finally:
        domain.close()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())

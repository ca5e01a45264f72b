"""The proxy process under a supervisor: `python -m aegaeon.proxy.worker`, told by JSON on stdin.

Serves HTTP until SIGTERM, which lets open answers end and refuses new requests.
"""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
from types import FrameType
from typing import TextIO

import msgspec
import uvicorn

from aegaeon import _native
from aegaeon.config import Settings
from aegaeon.errors import AegaeonError, ConfigError, Draining
from aegaeon.logs import set_up
from aegaeon.proxy.application import create_app
from aegaeon.proxy.http_limits import bounded_http, bounds_of
from aegaeon.proxy.launch import EXIT_CANNOT_START, EXIT_CRASHED, EXIT_DRAINED, ProxyLaunch
from aegaeon.proxy.residue import keep_for_good
from aegaeon.proxy.service import Service
from aegaeon.store.base import Domain
from aegaeon.store.domains import join_domain

log = logging.getLogger(__name__)

_POLL_S = 0.05
_BACKLOG = 2048
# For what has ended to be sent. The supervisor waits a little longer for us than drain_s.
_LAST_WORDS_S = 2


class DrainingServer(uvicorn.Server):
    """uvicorn, but the first signal drains: requests after it get a 503, open ones end."""

    def __init__(self, config: uvicorn.Config, settings: Settings, status: TextIO) -> None:
        super().__init__(config)
        self._settings = settings
        self._status = status
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if not self.should_exit:
            keep_for_good()
            log.info("ready host=%s port=%d", self._settings.host, self._settings.port)
            self._status.close()

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
        state = self.config.app.state  # type: ignore[union-attr]
        service: Service = state.service
        service.is_draining = True
        state.bodies.refuse()
        log.info("draining open_requests=%d", service.gateway.open_requests)
        waited_s = 0.0
        while service.gateway.open_requests and waited_s < self._settings.drain_s:
            await asyncio.sleep(_POLL_S)
            waited_s += _POLL_S
        service.gateway.fail_all(
            Draining("the server stopped before the answer was complete; ask again")
        )
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket, which listens only once the application is up.

    Raises ConfigError when the address cannot be had.
    """
    bound = None
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, proto)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except OSError as error:
        if bound is not None:
            bound.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port"
        ) from None


def serve(launch: ProxyLaunch, domain: Domain, status: TextIO) -> int:
    """Serve until drained; return the exit status. `status` is closed once requests are taken.

    Raises ConfigError when it cannot listen.
    """
    settings = launch.settings
    with contextlib.closing(bind(settings.host, settings.port)) as bound:
        app = create_app(settings, launch.specs, domain, launch.address)
        app.state.was_hung = launch.was_hung
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
            backlog=_BACKLOG,
            http=bounded_http(bounds_of(settings)),
            ws="none",
            timeout_graceful_shutdown=_LAST_WORDS_S,
        )
        server = DrainingServer(config, settings, status)
        server.run([bound])
    return EXIT_DRAINED if server.started else EXIT_CRASHED


def allow_connections() -> None:
    """Raise the limit of open files, often 1024, as far as this process may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> int:
    """Read the launch record, serve, and return the process's exit code."""
    launch = msgspec.json.decode(sys.stdin.buffer.read(), type=ProxyLaunch)
    # The instances die with it too, so there is nothing to drain, and the port must come free.
    _native.die_with_parent(signal.SIGKILL, launch.parent_pid)
    set_up(launch.settings.log_level, "proxy", launch.settings.log_format)
    allow_connections()
    with os.fdopen(launch.status_fd, "w", encoding="utf-8") as status:
        try:
            with contextlib.closing(join_domain(launch.settings)) as domain:
                return serve(launch, domain, status)
        except AegaeonError as error:
            log.error("%s error=%s", "failed" if status.closed else "cannot start", error)
            if status.closed:
                return EXIT_CRASHED
            status.write(str(error))
            return EXIT_CANNOT_START


if __name__ == "__main__":
    sys.exit(main())

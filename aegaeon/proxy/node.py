"""The server around the application when nobody else provides it: the domain, and instances of its
own where none live."""

import asyncio
import contextlib
import logging
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from multiprocessing.process import BaseProcess

import msgspec

from aegaeon.config import Settings
from aegaeon.errors import ConfigError, InstanceLost, StoreUnavailable
from aegaeon.proxy.gateway import Gateway
from aegaeon.store.base import Domain
from aegaeon.store.domains import domain_is_live, join_domain, open_domain

log = logging.getLogger(__name__)

START_S = 60.0
_POLL_S = 0.05
_RETRY_S = 0.5
# Beyond the drain: to end engines and remove the domain's names.
_STOP_EXTRA_S = 10.0


@asynccontextmanager
async def joined_domain(settings: Settings) -> AsyncIterator[Domain]:
    """Join the live domain of `settings`; where none lives, start instances first and stop them at
    the end. Raises ConfigError when they do not start.

    Of several workers of one server, none owns the instances, or they would go with it: they are
    the server's, and end with its process."""
    server = multiprocessing.parent_process()
    child = None if await _is_served(settings) else await _start_instances(settings, server)
    try:
        domain = await asyncio.to_thread(join_domain, settings)
        try:
            yield domain
        finally:
            domain.close()
    finally:
        if child is not None and server is None:
            await _stop_instances(child, settings.drain_s + _STOP_EXTRA_S)


async def started_gateway(make: Callable[[], Gateway], within_s: float = START_S) -> Gateway:
    """Return a gateway that has started, when the store answers. Raises StoreUnavailable where it
    does not within `within_s`, and as Gateway.start."""
    give_up_s = time.monotonic() + within_s
    while True:
        gateway = make()
        try:
            await gateway.start()
            return gateway
        except StoreUnavailable as error:
            gateway.abandon()
            if time.monotonic() >= give_up_s:
                raise
            log.warning("not started yet error=%s", error)
            await asyncio.sleep(_RETRY_S)


async def _is_served(settings: Settings) -> bool:
    """Whether a domain lives with instances that stay, or that are long in coming: those of a
    server that has just been stopped end first."""
    give_up_s = time.monotonic() + START_S
    while domain_is_live(settings):
        if time.monotonic() >= give_up_s or await asyncio.to_thread(_has_instances, settings):
            return True
        await asyncio.sleep(_POLL_S)
    return False


async def _start_instances(
    settings: Settings, server: BaseProcess | None
) -> subprocess.Popen[bytes]:
    """Start `aegaeon instances` and return when its domain lives. It dies with this process, or
    with the `server` that we are a worker of. Where several of us start at once, one's own the
    domain, and the others' end and are not needed."""
    log.info("starting instances domain=%s", settings.domain_name)
    command = [sys.executable, "-m", "aegaeon", "instances", "--config", "/dev/stdin"]
    if server is not None:
        command += ["--owner", str(server.pid)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        assert child.stdin is not None
        child.stdin.write(msgspec.json.encode(settings))
        child.stdin.close()
        for _ in range(int(START_S / _POLL_S)):
            if domain_is_live(settings) and _has_instances(settings):
                return child
            if child.poll() is not None and not domain_is_live(settings):
                raise ConfigError(
                    f"the instances ended with status {child.returncode} before they were up; "
                    "the log above says why"
                )
            await asyncio.sleep(_POLL_S)
        raise InstanceLost(f"the instances did not come up within {START_S:.0f} s; see the log")
    except BaseException:
        await _stop_instances(child, _STOP_EXTRA_S)
        raise


def _has_instances(settings: Settings) -> bool:
    # A fresh look each time: who claims a domain first removes what it finds there.
    with contextlib.closing(open_domain(settings)) as domain:
        store = domain.metadata()
        try:
            rows = store.sync_for_routing()
            return any(row.status.state != "draining" for row in rows)
        finally:
            store.close()


async def _stop_instances(child: subprocess.Popen[bytes], timeout_s: float) -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
    try:
        await asyncio.to_thread(child.wait, timeout_s)
    except subprocess.TimeoutExpired:
        log.error("instances did not stop in time pid=%d", child.pid)
        child.kill()
        await asyncio.to_thread(child.wait, _STOP_EXTRA_S)

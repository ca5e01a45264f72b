"""What changes while a proxy serves: keys with their file, models and bounds with the catalogue."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from aegaeon.config import Settings
from aegaeon.errors import AegaeonError, ConfigError
from aegaeon.proxy.guard import is_loopback
from aegaeon.proxy.keys import KeyRing
from aegaeon.proxy.service import Service
from aegaeon.proxy.waits import again
from aegaeon.store.catalog import CatalogStore

log = logging.getLogger(__name__)

CATALOG_S = 0.1
LOOK_S = 0.5  # between two looks at a file: a revoked key is let in no longer than this


OPEN_TO_ALL = (
    "without keys, whoever reaches host=%s may use the models; --keys-file lets in only those with "
    "a key (aegaeon keys create)"
)


@asynccontextmanager
async def kept_models(service: Service, store: CatalogStore) -> AsyncIterator[None]:
    """Serve what the domain's catalogue says, from now on."""
    await _follow(service, store)
    watcher = asyncio.create_task(
        again(CATALOG_S, partial(_follow, service, store)), name="aegaeon-catalog"
    )
    try:
        yield
    finally:
        await _end(watcher)


async def _follow(service: Service, store: CatalogStore) -> None:
    try:
        service.follow(await asyncio.to_thread(store.read))
    except AegaeonError as error:
        log.warning("catalogue not readable error=%s", error)


async def _end(watcher: asyncio.Task[None]) -> None:
    watcher.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watcher


@asynccontextmanager
async def kept_keys(settings: Settings) -> AsyncIterator[KeyRing | None]:
    """The keys of the settings' file, read anew when that changes; None where they name none.

    A file that has become broken changes nothing. Raises ConfigError when it is so at the start.
    """
    if not settings.keys_file:
        if not is_loopback(settings.host):
            log.warning(OPEN_TO_ALL, settings.host)
        yield None
        return
    ring = KeyRing(settings.keys_file)
    watcher = asyncio.create_task(again(LOOK_S, partial(_look, ring)), name="aegaeon-keys")
    try:
        yield ring
    finally:
        await _end(watcher)


async def _look(ring: KeyRing) -> None:
    try:
        if await asyncio.to_thread(ring.refresh):
            log.info("keys read again")
    except ConfigError as error:
        log.error("keys not read again, the old ones stay error=%s", error)

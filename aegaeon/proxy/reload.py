"""What changes while a proxy serves, because its file does: keys."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aegaeon.config import Settings
from aegaeon.errors import ConfigError
from aegaeon.proxy.guard import is_loopback
from aegaeon.proxy.keys import KeyRing

log = logging.getLogger(__name__)

LOOK_S = 0.5  # between two looks at a file: a revoked key is let in no longer than this


OPEN_TO_ALL = (
    "without keys, whoever reaches host=%s may use the models; --keys-file lets in only those with "
    "a key (aegaeon keys create)"
)


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
    watcher = asyncio.create_task(_watch(ring), name="aegaeon-keys")
    try:
        yield ring
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher


async def _watch(ring: KeyRing) -> None:
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            if await asyncio.to_thread(ring.refresh):
                log.info("keys read again")
        except ConfigError as error:
            log.error("keys not read again, the old ones stay error=%s", error)

"""Memory that the allocator keeps back when large input is done with goes back to the system.

Tokenising a megabyte makes millions of small pieces in the heap of the thread at work, and glibc
gives back no page of such a heap by itself: after a dozen, two gigabytes of a process were free
and still its own. And what stays for good is gone through no more.
"""

import asyncio
import contextlib
import ctypes
import gc
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aegaeon.memory.machine import resident_bytes

log = logging.getLogger(__name__)

LOOK_S = 5.0
AGAIN_LOOKS = 12
GROWTH_BYTES = 64 << 20  # that is worth the milliseconds


@asynccontextmanager
async def without_residue(look_s: float = LOOK_S) -> AsyncIterator[None]:
    """Within it, memory that this process has grown by and does not use is given back."""
    trim = _trim()
    if trim is None:
        yield
        return
    watch = _watch(trim, look_s, resident_bytes())
    watching = asyncio.create_task(watch, name="aegaeon-residue")
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def keep_for_good() -> None:
    """Have the collector pass over what there is by now, modules mostly, in a process that is a
    proxy and nothing else: to go through it took 60 ms, in which no stream had a token."""
    gc.collect()
    gc.freeze()


async def _watch(trim: Callable[[int], int], look_s: float, least: int) -> None:
    """`least` is how much of this process is in memory now."""
    last, looks = least, 0  # since memory was given back, and what was in use then
    while True:
        await asyncio.sleep(look_s)
        now, looks = resident_bytes(), looks + 1
        least, last = min(least, now), min(last, now)
        # What was in use then may be free by now.
        is_due = looks >= AGAIN_LOOKS and now > least + GROWTH_BYTES
        if is_due or now > last + GROWTH_BYTES:
            await asyncio.to_thread(trim, 0)  # without the interpreter's lock
            last, looks = resident_bytes(), 0
            log.debug("gave memory back bytes=%d resident=%d", now - last, last)


def _trim() -> Callable[[int], int] | None:
    """Return what gives free memory back, where the allocator has it (glibc's does)."""
    with contextlib.suppress(AttributeError):
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
        return trim
    return None

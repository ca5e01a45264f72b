"""Waiting with a bound, without ever losing a cancellation."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


async def within(timeout_s: float, work: Coroutine[Any, Any, _T]) -> _T:
    """Return what `work` returns, or raise asyncio.TimeoutError and cancel it.

    As asyncio.wait_for, which before Python 3.12 swallows a cancellation that comes in the moment
    in which the work ends: a client that went away would be served for ever.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=timeout_s)
        if not task.done():
            raise asyncio.TimeoutError
        return task.result()
    finally:
        task.cancel()

"""Waiting with a bound, without ever losing a cancellation."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

log = logging.getLogger(__name__)

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
        # An error's traceback leads here, and from a task to its error: that circle would keep all
        # that `work` held, a large body say, until the collector looks at old objects.
        del task


async def again(every_s: float, look: Callable[[], Awaitable[None]]) -> None:
    """Await `look` again and again, with such a pause between. What it raises is a fault of ours:
    it is logged, and the next look may go well; nobody would notice that there are none any more.
    """
    while True:
        try:
            await look()
        except Exception:
            log.exception("a look failed, the next one is in %.1f s", every_s)
        await asyncio.sleep(every_s)


class Alarm:
    """Lets one task sleep until it is woken or its time has come, without a task or, as a rule, a
    timer for each sleep: one that was set for an earlier sleep is set anew when it goes off."""

    def __init__(self) -> None:
        self._sleeper: asyncio.Future[bool] | None = None
        self._due_s = 0.0
        self._timer: asyncio.Handle | None = None
        self._timer_s = 0.0

    async def wait(self, due_s: float) -> bool:
        """Return True when woken, or False at `due_s` of the loop's clock."""
        assert self._sleeper is None, "one task sleeps at a time"
        self._due_s = due_s
        if self._timer is None or due_s < self._timer_s:
            self.close()
            self._set_timer()
        self._sleeper = asyncio.get_running_loop().create_future()
        try:
            return await self._sleeper
        finally:
            self._sleeper = None

    def wake(self) -> None:
        """Wake the task, if one sleeps."""
        if self._sleeper is not None and not self._sleeper.done():
            self._sleeper.set_result(True)

    def close(self) -> None:
        """Stop the timer; nobody sleeps."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        self._timer_s = self._due_s
        self._timer = asyncio.get_running_loop().call_at(self._due_s, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._sleeper is None or self._sleeper.done():
            return
        if self._due_s > self._timer_s:
            self._set_timer()
        else:
            self._sleeper.set_result(False)

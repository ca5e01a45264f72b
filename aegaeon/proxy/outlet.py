"""A connection's way out that need not be waited for as long as the connection keeps up."""

from collections.abc import Generator
from typing import Any

from starlette.types import Message, Send

_DONE: Any = object()


class Outlet:
    """Sends the body of one answer through the server's `send`. Whoever has something to send calls
    `begin`, in no task; where the server would have its caller wait, some task must `finish` first.
    One sends at a time, so what is held for a slow client is one body and the server's buffer."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._begun: _Begun | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether something has been begun that must be finished first."""
        return self._begun is not None

    def begin(self, message: Message) -> bool:
        """Send `message`; False when it is to be finished. Raises what the server raises."""
        assert self._begun is None, "one body is sent at a time"
        steps = self._send(message).__await__()
        awaited = next(steps, _DONE)
        if awaited is _DONE:
            return True
        self._begun = _Begun(awaited, steps)
        return False

    async def finish(self) -> None:
        """Wait until what was begun is sent, if anything is left of it. Raises as `begin`."""
        if self._begun is not None:
            try:
                await self._begun
            finally:
                self._begun = None

    async def send(self, message: Message) -> None:
        """Finish what was begun, then send `message`, waiting where that is asked for."""
        await self.finish()
        await self._send(message)

    def close(self) -> None:
        """Give up what was begun. Idempotent."""
        if self._begun is not None:
            self._begun.close()
            self._begun = None


class _Begun:
    """The rest of an awaitable whose first step has been made outside of any task."""

    def __init__(self, awaited: Any, rest: Generator[Any, Any, None]) -> None:
        self._awaited = awaited
        self._rest = rest

    def __await__(self) -> Generator[Any, Any, None]:
        try:
            yield self._awaited  # as the awaitable would have, had it been awaited by this task
        except BaseException:
            self.close()
            raise
        yield from self._rest

    def close(self) -> None:
        """Unwind it where it stands."""
        self._rest.close()

"""The choices of one answer: generations whose text is merged in order of arrival."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from types import TracebackType

import msgspec

from aegaeon.proxy.gateway import Gateway
from aegaeon.proxy.generation import Generation
from aegaeon.proxy.transcript import Piece, Transcript

# Pieces that may wait for a slow client; behind them only token ids pile up, up to max_tokens.
_MAX_PIECES = 256


class Choices:
    """Runs the generations at once. A context manager: leaving it cancels what still runs."""

    def __init__(
        self,
        gateway: Gateway,
        generations: Sequence[Generation],
        transcripts: Sequence[Transcript],
    ) -> None:
        self._gateway = gateway
        self._work = tuple(zip(generations, transcripts, strict=True))
        # None: no piece came in time.
        self._pieces: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(_MAX_PIECES)
        self._tasks: list[asyncio.Task[None]] = []
        self._unfinished = len(self._work)

    async def __aenter__(self) -> "Choices":
        self._tasks = [asyncio.create_task(self._pump(index)) for index in range(len(self._work))]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def is_done(self) -> bool:
        """Every choice has given its last piece."""
        return self._unfinished == 0

    async def next(self, timeout_s: float) -> Piece | None:
        """Return the next piece, or None when none came in time. Raises the first error of any."""
        # Not `wait_for`: this runs once a token, and a timer is cheaper than a task.
        timer = asyncio.get_running_loop().call_later(timeout_s, self._wake)
        try:
            return self._checked(await self._pieces.get())
        finally:
            timer.cancel()

    def ready(self) -> Piece | None:
        """Return a piece that is there already, or None."""
        try:
            return self._checked(self._pieces.get_nowait())
        except asyncio.QueueEmpty:
            return None

    def _wake(self) -> None:
        if self._pieces.empty():
            self._pieces.put_nowait(None)

    def _checked(self, item: Piece | Exception | None) -> Piece | None:
        if isinstance(item, Exception):
            raise item
        if item is not None and item.finish_reason is not None:
            self._unfinished -= 1
        return item

    async def _pump(self, index: int) -> None:
        generation, transcript = self._work[index]
        try:
            async with aclosing(self._gateway.stream(generation)) as deltas:
                async for delta in deltas:
                    piece = transcript.take(delta)
                    if piece.finish_reason not in {None, delta.finish_reason}:
                        self._gateway.finish(generation.id)
                    await self._pieces.put(msgspec.structs.replace(piece, index=index))
                    if piece.finish_reason is not None:
                        return
        except Exception as error:
            # The one that awaits the pieces raises it, with its traceback.
            await self._pieces.put(error)

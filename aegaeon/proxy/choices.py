"""The choices of one answer: each a generation turned into text, all merged in order of arrival."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import TracebackType

import msgspec

from aegaeon.proxy.detokenize import Detokenizer, StopMatcher
from aegaeon.proxy.gateway import Gateway
from aegaeon.proxy.generation import Generation
from aegaeon.types import FinishReason, InstanceId

# Pieces that may wait for a slow client; behind them only token ids pile up, up to max_tokens.
_MAX_PIECES = 256


class Piece(msgspec.Struct, frozen=True):
    """New text of choice `index`, made of `tokens` more tokens; the last has a finish reason."""

    index: int
    text: str
    tokens: int
    finish_reason: FinishReason | None
    instance: InstanceId
    cached_tokens: int = 0  # of its prompt


class Choices:
    """Runs the generations at once. A context manager: leaving it cancels what still runs."""

    def __init__(
        self,
        gateway: Gateway,
        generations: Sequence[Generation],
        detokenizers: Sequence[Detokenizer],
        stops: tuple[str, ...],
    ) -> None:
        self._gateway = gateway
        self._work = tuple(zip(generations, detokenizers, strict=True))
        self._stops = stops
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
        generation, detokenizer = self._work[index]
        stops = StopMatcher(self._stops)
        try:
            async with aclosing(_pieces(self._gateway, generation, detokenizer, stops)) as pieces:
                async for piece in pieces:
                    await self._pieces.put(msgspec.structs.replace(piece, index=index))
        except Exception as error:
            # The one that awaits the pieces raises it, with its traceback.
            await self._pieces.put(error)


async def _pieces(
    gateway: Gateway, generation: Generation, detokenizer: Detokenizer, stops: StopMatcher
) -> AsyncGenerator[Piece, None]:
    """Yield the generation's text; a stop string or token ends it and is not in it."""
    async with aclosing(gateway.stream(generation)) as deltas:
        async for delta in deltas:
            token_ids = delta.token_ids
            ended_by_token = delta.finish_reason == "stop"
            text = ""
            for count, token_id in enumerate(token_ids, start=1):
                is_stop_token = ended_by_token and count == len(token_ids)
                new = "" if is_stop_token else detokenizer.push(token_id)
                new, is_stopped = stops.push(new)
                text += new
                if is_stopped:
                    yield Piece(0, text, count, "stop", delta.instance, delta.cached_tokens)
                    return
            finish = delta.finish_reason
            if finish is not None:
                rest, is_stopped = stops.push(detokenizer.finish())
                text += rest if is_stopped else rest + stops.finish()
                finish = "stop" if is_stopped else finish
            count = len(token_ids)
            yield Piece(0, text, count, finish, delta.instance, delta.cached_tokens)

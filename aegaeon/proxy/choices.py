"""The choices of one answer: each a generation turned into text, all merged in order of arrival."""

import asyncio
from collections.abc import Sequence
from functools import partial
from types import TracebackType

import msgspec

from aegaeon.proxy.detokenize import Detokenizer, StopMatcher
from aegaeon.proxy.gateway import Gateway
from aegaeon.proxy.generation import Delta, Generation, OpenRequest
from aegaeon.proxy.waits import Alarm
from aegaeon.types import FinishReason, InstanceId


class Piece(msgspec.Struct, frozen=True):
    """New text of choice `index`, made of `tokens` more tokens; the last has a finish reason."""

    index: int
    text: str
    tokens: int
    finish_reason: FinishReason | None
    instance: InstanceId


class Choices:
    """Runs the generations at once. A context manager: leaving it cancels what still runs. One task
    takes the pieces; text is made when it does, so that only token ids pile up for a slow client,
    up to max_tokens."""

    def __init__(
        self,
        gateway: Gateway,
        generations: Sequence[Generation],
        detokenizers: Sequence[Detokenizer],
        stops: tuple[str, ...],
    ) -> None:
        self._gateway = gateway
        self._texts = tuple(
            _Text(index, generation, detokenizer, StopMatcher(stops))
            for index, (generation, detokenizer) in enumerate(
                zip(generations, detokenizers, strict=True)
            )
        )
        # Those with tokens to take, in order of arrival; the values are nothing.
        self._changed: dict[int, None] = {}
        self._error: Exception | None = None
        self._alarm = Alarm()
        self._tasks: list[asyncio.Task[None]] = []
        self._unfinished = len(self._texts)

    async def __aenter__(self) -> "Choices":
        self._tasks = [asyncio.create_task(self._keep(text)) for text in self._texts]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._alarm.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def is_done(self) -> bool:
        """Every choice has given its last piece."""
        return self._unfinished == 0

    async def next(self, timeout_s: float) -> Piece | None:
        """Return the next piece, or None when none came in time. Raises the first error of any."""
        piece = self.ready()
        if piece is None:
            due_s = asyncio.get_running_loop().time() + timeout_s
            while await self._alarm.wait(due_s) and (piece := self.ready()) is None:
                pass
        return piece

    def ready(self) -> Piece | None:
        """Return a piece that is there already, or None."""
        while self._changed:
            index = next(iter(self._changed))
            del self._changed[index]
            piece = self._texts[index].take()
            if piece is not None:
                if piece.finish_reason is not None:
                    self._unfinished -= 1
                    self._tasks[index].cancel()  # a stop string may end it before its tokens
                return piece
        if self._error is not None:
            raise self._error
        return None

    def _note(self, index: int) -> None:
        self._changed[index] = None
        self._alarm.wake()

    async def _keep(self, text: "_Text") -> None:
        try:
            text.opened = self._gateway.open(text.generation, partial(self._note, text.index))
            await self._gateway.keep(text.opened)
        except Exception as error:
            # The one that awaits the pieces raises it, with its traceback.
            self._error = self._error or error
            self._alarm.wake()


class _Text:
    """A generation's tokens as they become text; a stop string or token ends it, not being in
    it."""

    def __init__(
        self, index: int, generation: Generation, detokenizer: Detokenizer, stops: StopMatcher
    ) -> None:
        self.index = index
        self.generation = generation
        self.opened: OpenRequest | None = None
        self._detokenizer = detokenizer
        self._stops = stops
        self._is_over = False

    def take(self) -> Piece | None:
        """Return what has come since the last time, if anything."""
        if self._is_over or self.opened is None:
            return None
        delta = self.opened.take()
        if delta is None:
            return None
        piece = self._piece(delta)
        self._is_over = piece.finish_reason is not None
        return piece

    def _piece(self, delta: Delta) -> Piece:
        stops, token_ids = self._stops, delta.token_ids
        ended_by_token = delta.finish_reason == "stop"
        text = ""
        for count, token_id in enumerate(token_ids, start=1):
            is_stop_token = ended_by_token and count == len(token_ids)
            new = "" if is_stop_token else self._detokenizer.push(token_id)
            new, is_stopped = stops.push(new)
            text += new
            if is_stopped:
                return Piece(self.index, text, count, "stop", delta.instance)
        finish = delta.finish_reason
        if finish is not None:
            rest, is_stopped = stops.push(self._detokenizer.finish())
            text += rest if is_stopped else rest + stops.finish()
            finish = "stop" if is_stopped else finish
        return Piece(self.index, text, len(token_ids), finish, delta.instance)

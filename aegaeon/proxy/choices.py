"""The choices of one answer: generations whose text is merged in order of arrival."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType

from aegaeon.proxy.gateway import Gateway
from aegaeon.proxy.generation import Generation, OpenRequest
from aegaeon.proxy.transcript import Piece, Transcript
from aegaeon.proxy.waits import Alarm


class Choices:
    """Runs the generations at once. A context manager: leaving it cancels what still runs. One task
    takes the pieces; text is made when it does, so that only token ids pile up for a slow client,
    up to max_tokens."""

    def __init__(
        self,
        gateway: Gateway,
        generations: Sequence[Generation],
        transcripts: Sequence[Transcript],
    ) -> None:
        self._gateway = gateway
        work = zip(generations, transcripts, strict=True)
        self._texts = tuple(Text(gateway, index, *both) for index, both in enumerate(work))
        # Those with tokens to take, in order of arrival; the values are nothing.
        self._changed: dict[int, None] = {}
        self._error: Exception | None = None
        self._alarm = Alarm()
        self._tell = self._alarm.wake
        self._tasks: list[asyncio.Task[None]] = []
        self._unfinished = len(self._texts)
        self._kept_bytes = 0  # log-probabilities of those that have ended
        self._heir: OpenRequest | None = None  # among whose bytes they count

    async def __aenter__(self) -> "Choices":
        try:
            opened = self._gateway.open_all([text.generation for text in self._texts])
        except Exception as error:
            # The one that awaits the pieces raises it, with its traceback.
            self._error = error
            return self
        for text, one in zip(self._texts, opened, strict=True):
            text.opened, one.on_tokens = one, partial(self._note, text.index)
        self._tasks = [asyncio.create_task(self._keep(one)) for one in opened]
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
        for text in self._texts:
            if text.opened is not None:
                self._gateway.leave(text.opened)  # its task may never have begun

    @property
    def only(self) -> "Text | None":
        """The only choice, if there is one."""
        return self._texts[0] if len(self._texts) == 1 else None

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

    @contextlib.contextmanager
    def told(self, take: Callable[[], None]) -> Iterator[None]:
        """Within it, `take` is called where `ready` has more to return or to raise, instead of
        waking who awaits `next`."""
        self._tell = take
        try:
            yield
        finally:
            self._tell = self._alarm.wake

    def ready(self) -> Piece | None:
        """Return a piece that is there already, or None. Raises as `next`."""
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
        self._tell()

    async def _keep(self, opened: OpenRequest) -> None:
        try:
            await self._gateway.keep(opened)
        except Exception as error:
            self._error = self._error or error
            self._tell()
        finally:
            self._hand_on(opened)  # also where its text has ended, which cancels this

    def _hand_on(self, opened: OpenRequest) -> None:
        """One has ended: what is kept of it until all have counts as of one that still runs."""
        asked = opened.generation
        more = 0 if asked.is_streamed else opened.made * asked.score_bytes
        self._kept_bytes += more
        if self._heir is not None and self._heir is not opened:
            self._heir.on_held(more)
            return
        others = (text.opened for text in self._texts if text.opened is not opened)
        running = (one for one in others if one and not (one.has_ended or one.is_stopped))
        self._heir = next(running, None)
        if self._heir is not None:
            self._heir.on_held(self._kept_bytes)


class Text:
    """A generation's tokens as they become text."""

    def __init__(
        self, gateway: Gateway, index: int, generation: Generation, transcript: Transcript
    ) -> None:
        self.index = index
        self.generation = generation
        self.opened: OpenRequest | None = None
        self._gateway = gateway
        self.transcript = transcript
        transcript.index = index
        self._is_over = False

    def take(self) -> Piece | None:
        """Return what has come since the last time, if anything."""
        if self._is_over or self.opened is None:
            return None
        delta = self.opened.take()
        if delta is None:
            return None
        piece = self.transcript.take(delta)
        self._is_over = piece.finish_reason is not None
        if piece.finish_reason not in {None, delta.finish_reason}:
            # Its tokens may go on: leaving them is no cancel.
            self._gateway.finish(self.generation.id)
        return piece

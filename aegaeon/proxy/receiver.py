"""Takes what instances say from the proxy's mailbox to its event loop, in batches."""

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec

from aegaeon.errors import AegaeonError, StoreUnavailable
from aegaeon.explanations import Explained
from aegaeon.store.base import Mailbox
from aegaeon.store.codec import decode_replies
from aegaeon.types import Reply

log = logging.getLogger(__name__)

_Record = tuple[bytes, float]  # and when it came (monotonic clock)

_RECEIVE_S = 0.5
# Replies in one turn of the loop: what they lead to is sent at its end, so that the first tokens of
# a large batch do not wait until the last ones are written. Who is behind by more takes all in, so
# that the tokens of a stream go out together, at the price of one.
_SLICE = 32
_BEHIND = 1024
# A turn begins no sooner behind the last one than that one took, up to this: where tokens come as
# fast as they can be sent, each frame would have one, for twice the work at all ends.
_MOST_REST_S = 0.004


class Receiver:
    """Owns one thread, from `start` to `stop`. `take` gets each reply and when it came (monotonic
    clock), on `loop`; `on_lost` is called there when nothing will ever come again."""

    def __init__(
        self,
        mailbox: Mailbox,
        loop: asyncio.AbstractEventLoop,
        take: Callable[[Reply | Explained, float], None],
        on_lost: Callable[[], None],
        first: Callable[[list[_Record]], list[_Record]] = list,
    ) -> None:
        """`first` gets all records that have come, on `loop`, and returns what is left of them."""
        self._mailbox = mailbox
        self._loop = loop
        self._take = take
        self._on_lost = on_lost
        self._first = first
        self._records: deque[_Record] = deque()
        self._replies: deque[tuple[Reply | Explained, float]] = deque()
        self._is_due = False  # the loop has been told to look
        self._next_s = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="aegaeon-receiver")

    def start(self) -> None:
        """Begin to receive."""
        self._thread.start()

    async def stop(self) -> None:
        """Take nothing more and wait for the thread's end. Idempotent."""
        self._closed.set()
        if self._thread.is_alive():
            self._mailbox.wake()
            await asyncio.to_thread(self._thread.join, 5.0)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                records = self._mailbox.receive(_RECEIVE_S)
            except StoreUnavailable as error:
                log.warning("mailbox not readable error=%s", error)
                self._closed.wait(_RECEIVE_S)
                continue
            except AegaeonError as error:
                log.error("mailbox lost error=%s", error)
                self._loop.call_soon_threadsafe(self._on_lost)
                return
            if not records:
                continue
            self._note(records)
            if (rest_s := self._next_s - time.monotonic()) > 0:
                self._closed.wait(rest_s)
                with contextlib.suppress(AegaeonError):  # the next to receive meets it, too
                    self._note(self._mailbox.receive(0.0))
            # To wake the loop is a system call: once is enough until it has looked.
            if not self._is_due:
                self._is_due = True
                self._loop.call_soon_threadsafe(self._hand_on)

    def _note(self, records: list[bytes]) -> None:
        now = time.monotonic()
        self._records.extend((record, now) for record in records)

    def _hand_on(self) -> None:
        begun_s = time.monotonic()
        self._hand_on_some()
        ended_s = time.monotonic()
        self._next_s = ended_s + min(ended_s - begun_s, _MOST_REST_S)

    def _hand_on_some(self) -> None:
        # First: what comes from now on is either seen below or told anew.
        self._is_due = False
        replies = self._replies
        records = [self._records.popleft() for _ in range(len(self._records))]
        if self._closed.is_set():
            replies.clear()
            return
        for record, received_s in self._first(records):
            replies.extend(zip(_decoded(record), itertools.repeat(received_s)))
        for _ in range(len(replies) if len(replies) > _BEHIND else min(len(replies), _SLICE)):
            self._take(*replies.popleft())
        if replies and not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._hand_on)


def _decoded(record: bytes) -> list[Reply | Explained]:
    try:
        return decode_replies(record)
    except (msgspec.DecodeError, AegaeonError) as error:
        log.error("reply not readable bytes=%d error=%s", len(record), error)
        return []

"""A mailbox as a Redis stream: bounded, and exactly once for both sides across restarts.

A sender numbers its records, so a try repeated after a broken connection is not entered twice. The
reader names the last entry that arrived and the server keeps everything behind it until the reader
acknowledges it, so an answer lost on its way is asked for again. Entry ids contain the time:
a server that forgets its last entries never gives their ids to others.
"""

import secrets
import threading
import time
from contextlib import suppress
from typing import Any

from aegaeon.errors import RecordTooLarge, RegionError, RingClosed, RingFull, StoreUnavailable
from aegaeon.store.base import Mailbox
from aegaeon.store.redis_link import RedisLink
from aegaeon.store.redis_scripts import ABANDONED_MS, ACKNOWLEDGE, CREATE, DROP, SEND

MAX_RECORD_BYTES = 1 << 20
RECORD_OVERHEAD_BYTES = 16
BLOCK_S = 1.0  # well under the socket's timeout
FULL_PAUSE_S = 0.005


class RedisMailbox(Mailbox):
    """One generation of a mailbox; a later creator of the same address ends it."""

    def __init__(self, link: RedisLink, key: str, generation: str, capacity_bytes: int) -> None:
        """For `create` and `open`."""
        self._link = link
        self._key = key
        self._generation = generation
        self._capacity_bytes = capacity_bytes
        self._stream = f"{key}:{generation}"
        self._writers = f"{self._stream}:writers"
        self._bell = f"{self._stream}:bell"
        self._keys = [self._key, self._stream, self._writers, self._bell]
        self._send = link.script(SEND)
        self._acknowledge = link.script(ACKNOWLEDGE)
        self._writer = secrets.token_hex(8)
        self._sequence = 0
        self._lock = threading.Lock()
        self._is_reader = False
        self._is_closed = False
        self._woken = threading.Event()
        self._last_entry = b"0-0"
        self._last_bell = b"0-0"
        self._unacknowledged_bytes = 0
        self._server_run = ""
        self._settled_s = time.monotonic()

    @classmethod
    def create(cls, link: RedisLink, key: str, capacity_bytes: int) -> "RedisMailbox":
        """Begin a new generation of the mailbox `key` and become its reader."""
        mailbox = cls(link, key, secrets.token_hex(8), capacity_bytes)
        mailbox._is_reader = True
        mailbox._enter()
        return mailbox

    @classmethod
    def open(cls, link: RedisLink, key: str) -> "RedisMailbox":
        """Open the present generation for sending, or raise RingClosed."""
        found: Any = link.call(lambda: link.client.hmget(key, ["generation", "capacity"]))
        if None in found:
            raise _closed(key)
        return cls(link, key, found[0].decode(), int(found[1]))

    def send(self, record: bytes, timeout_s: float = 0.0) -> None:
        """See Mailbox. Raises StoreUnavailable too."""
        cost_bytes = len(record) + RECORD_OVERHEAD_BYTES
        if len(record) > MAX_RECORD_BYTES or cost_bytes > self._capacity_bytes:
            raise RecordTooLarge(
                f"a record of {len(record)} bytes is over the limit of mailbox {self._key}; "
                "shorten the prompt"
            )
        deadline_s = time.monotonic() + timeout_s
        while not self._try_send(record, cost_bytes):
            if time.monotonic() >= deadline_s:
                raise RingFull(
                    f"mailbox {self._key} is full ({self._capacity_bytes} bytes); try again later"
                )
            time.sleep(FULL_PAUSE_S)

    def receive(self, timeout_s: float, max_records: int = 1024) -> list[bytes]:
        """See Mailbox. Raises StoreUnavailable too; then nothing is lost either."""
        if not self._is_reader:
            raise RegionError(f"mailbox {self._key} was opened for sending; its creator reads")
        if self._is_closed:
            raise _closed(self._key)
        try:
            return self._wait(time.monotonic() + timeout_s, max_records)
        except _WokenWithoutServer:
            self._woken.clear()
            return []

    def wake(self) -> None:
        """See Mailbox."""
        self._woken.set()
        # Without a server the reader is between two tries, and looks at the flag.
        with suppress(StoreUnavailable):
            self._link.call(self._ring_bell, pause=_give_up)

    def close(self) -> None:
        """See Mailbox."""
        if self._is_closed:
            return
        self._is_closed = True
        with suppress(StoreUnavailable):
            if self._is_reader:
                self._link.call(self._drop, pause=_give_up)
            else:
                forget = self._link.client.hdel
                self._link.call(lambda: forget(self._writers, self._writer), pause=_give_up)

    def unlink(self) -> None:
        """See Mailbox."""
        if self._is_reader:
            self._link.call(self._drop)

    def _drop(self) -> None:
        self._link.script(DROP)(self._keys, [self._generation])

    def _enter(self) -> None:
        create = self._link.script(CREATE)
        args = [self._generation, self._capacity_bytes, ABANDONED_MS]
        self._server_run = self._link.server_run()
        self._link.call(lambda: create([self._key], args))

    def _try_send(self, record: bytes, cost_bytes: int) -> bool:
        # The lock keeps the numbers in order; each is used for one record and its repetitions only.
        with self._lock:
            self._sequence += 1
            keys = [self._key, self._stream, self._writers]
            args = [self._generation, self._writer, self._sequence, cost_bytes, record]
            answer = self._link.call(lambda: self._send(keys, args))
        if answer == -1:
            raise _closed(self._key)
        return bool(answer)

    def _wait(self, deadline_s: float, max_records: int) -> list[bytes]:
        if self._unacknowledged_bytes or time.monotonic() > self._settled_s + BLOCK_S:
            self._settle()
        while True:
            records = self._read(max_records, min(BLOCK_S, deadline_s - time.monotonic()))
            if self._unacknowledged_bytes > self._capacity_bytes // 4:
                self._settle()
            if records:
                return records
            if self._woken.is_set() or time.monotonic() >= deadline_s:
                self._woken.clear()
                return []
            self._settle()

    def _read(self, max_records: int, block_s: float) -> list[bytes]:
        """Return the entries behind the last one that arrived, waiting up to `block_s`."""

        def read() -> Any:
            streams: dict[Any, Any] = {
                self._stream: self._last_entry,
                self._bell: self._last_bell,
            }
            may_block = block_s > 0 and not self._woken.is_set()
            block_ms = max(1, int(block_s * 1000)) if may_block else None
            return self._link.client.xread(streams, count=max_records, block=block_ms)

        answer = self._link.call(read, pause=self._pause)
        records: list[bytes] = []
        for stream, entries in _streams(answer):
            if stream == self._bell.encode():
                self._last_bell = entries[-1][0]
                self._woken.set()
            else:
                self._last_entry = entries[-1][0]
                records = [fields[b"r"] for _, fields in entries]
        self._unacknowledged_bytes += sum(len(record) + RECORD_OVERHEAD_BYTES for record in records)
        return records

    def _settle(self) -> None:
        """Let the server forget what has arrived; notice when the mailbox is not ours any more."""
        args = [self._generation, self._last_entry, RECORD_OVERHEAD_BYTES, ABANDONED_MS]

        def acknowledge() -> Any:
            return self._acknowledge(self._keys, args)

        if self._link.call(acknowledge, pause=self._pause) == -1:
            # A server without persistence forgets us when it restarts; a successor ends us.
            exists = self._link.call(lambda: self._link.client.exists(self._key))
            if exists or self._is_closed or self._server_run == self._link.server_run():
                raise _closed(self._key)
            self._enter()
        self._settled_s = time.monotonic()
        self._unacknowledged_bytes = 0

    def _pause(self, seconds: float) -> None:
        if self._woken.wait(seconds):
            raise _WokenWithoutServer

    def _ring_bell(self) -> None:
        self._link.client.xadd(self._bell, {"w": "1"}, maxlen=1, approximate=False)


class _WokenWithoutServer(Exception):
    """The reader was woken between two tries to reach the server."""


def _streams(answer: Any) -> list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]:
    """Read an XREAD answer of either protocol: pairs, or a map to lists of lists."""
    if not answer:
        return []
    if isinstance(answer, dict):
        return [(stream, entries[0]) for stream, entries in answer.items()]
    return [(stream, entries) for stream, entries in answer]


def _give_up(_: float) -> None:
    """Sleep no more: for what is done on the way out."""
    raise StoreUnavailable("Redis is away; nothing is waited for while closing")


def _closed(key: str) -> RingClosed:
    return RingClosed(f"mailbox {key} has no reader; look its owner up again")

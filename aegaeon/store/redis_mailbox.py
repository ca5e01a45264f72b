"""A mailbox as a Redis stream: bounded, and exactly once for both sides across restarts.

A sender numbers its records, so a try repeated after a broken connection is not entered twice. The
reader names the last entry that arrived and the server keeps everything behind it until the reader
acknowledges it, so an answer lost on its way is asked for again.

A server that takes over (redis_link.py) may lack the last records that the one before had
acknowledged, and hold some that had been read. A sender names the record before, learns so what is
missing, and sends it again from what it keeps (redis_kept.py); the reader begins at the front again
and drops, by the senders' numbers, what it has had. Entry ids mean nothing from one server to
another.
"""

import logging
import secrets
import threading
import time
from contextlib import suppress
from typing import Any

from aegaeon.errors import RecordTooLarge, RegionError, RingClosed, RingFull, StoreUnavailable
from aegaeon.store.base import Mailbox
from aegaeon.store.redis_kept import KeptRecords
from aegaeon.store.redis_link import RedisLink
from aegaeon.store.redis_scripts import ABANDONED_MS, ACKNOWLEDGE, CREATE, DROP, SEND

log = logging.getLogger(__name__)

MAX_RECORD_BYTES = 1 << 20
RECORD_OVERHEAD_BYTES = 16
BLOCK_S = 1.0  # at most half as long as an answer is waited for
FULL_PAUSE_S = 0.005
MAX_WRITERS = 4096  # whose last numbers a reader remembers


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
        self._kept = KeptRecords()
        self._is_repair_due = False
        self._lock = threading.Lock()
        self._arrived: dict[bytes, int] = {}  # by writer, the one heard of last at the end
        self._epoch = link.epoch
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
        while not self._try_send(record):
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

    def repair(self) -> bool:
        """Send again what a server that has taken over lacks of what was acknowledged; say whether
        that is done. Raises StoreUnavailable."""
        if self._is_reader or self._is_closed:
            return True
        self._is_repair_due = True
        # Who holds the lock looks at the flag once more when it has let go.
        while self._is_repair_due and self._lock.acquire(blocking=False):
            try:
                self._is_repair_due = False
                if not self._send_again(self._link.call(self._last_held)):
                    self._is_repair_due = True
                    return False
            except StoreUnavailable:
                self._is_repair_due = True
                raise
            finally:
                self._lock.release()
        return not self._is_repair_due

    def _try_send(self, record: bytes) -> bool:
        # The lock keeps the numbers in order; each is used for one record and its repetitions only.
        with self._lock:
            self._sequence += 1
            answer = self._commit(self._sequence, record)
        if answer == -1:
            raise _closed(self._key)
        if self._is_repair_due:
            # This record is committed, whatever becomes of those before; the link asks again.
            with suppress(StoreUnavailable):
                self.repair()
        return bool(answer)

    def _commit(self, sequence: int, record: bytes) -> int:
        answer = self._submit(self._kept.last, sequence, record)
        if isinstance(answer, list):
            if not self._send_again(answer[0]):
                return 0
            answer = self._submit(self._kept.last, sequence, record)
        if answer == 1:
            self._kept.keep(sequence, record)
        return answer if isinstance(answer, int) else 0

    def _submit(self, before: int, sequence: int, record: bytes) -> Any:
        keys = [self._key, self._stream, self._writers]
        cost_bytes = len(record) + RECORD_OVERHEAD_BYTES
        args = [self._generation, self._writer, sequence, cost_bytes, record, before]
        return self._link.call(lambda: self._send(keys, args))

    def _last_held(self) -> int:
        return int(self._link.client.hget(self._writers, self._writer) or 0)

    def _send_again(self, last: int) -> bool:
        """Send what is kept behind record `last`, the last one that the server has of ours; say
        whether there was room for all."""
        lacking = self._kept.behind(last)
        first = lacking[0].before if lacking else self._kept.last
        if last < first:
            log.error(
                "records lost by redis, older than what is kept mailbox=%s behind=%d up_to=%d",
                *(self._key, last, first),
            )
        for kept in lacking:
            answer = self._submit(last, kept.sequence, kept.record)
            if answer == -1:
                self._kept.forget()
                return True  # the next to send meets it, too
            if answer != 1:
                return False
            last = kept.sequence
        if lacking:
            log.info("sent again what redis lacked mailbox=%s records=%d", self._key, len(lacking))
        self._kept.last = last
        return True

    def _wait(self, deadline_s: float, max_records: int) -> list[bytes]:
        if self._unacknowledged_bytes or time.monotonic() > self._settled_s + BLOCK_S:
            self._settle()
        while True:
            block_s = min(BLOCK_S, self._link.answer_s / 2)
            records = self._read(max_records, min(block_s, deadline_s - time.monotonic()))
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
            self._begin_again()
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
                self._unacknowledged_bytes += sum(
                    len(fields[b"r"]) + RECORD_OVERHEAD_BYTES for _, fields in entries
                )
                records = [fields[b"r"] for _, fields in entries if self._is_new(fields)]
        return records

    def _begin_again(self) -> None:
        """Where another server has taken over, begin at the front of what it holds."""
        if self._epoch != self._link.epoch:
            self._epoch = self._link.epoch
            self._last_entry = b"0-0"

    def _is_new(self, fields: dict[bytes, bytes]) -> bool:
        """Whether this record has not arrived before; notes that it has."""
        writer, sequence = fields[b"w"], int(fields[b"s"])
        before = self._arrived.pop(writer, 0)
        self._arrived[writer] = max(before, sequence)
        if len(self._arrived) > MAX_WRITERS:
            del self._arrived[next(iter(self._arrived))]
        return sequence > before

    def _settle(self) -> None:
        """Let the server forget what has arrived; notice when the mailbox is not ours any more."""

        def acknowledge() -> Any:
            self._begin_again()
            args = [self._generation, self._last_entry, RECORD_OVERHEAD_BYTES, ABANDONED_MS]
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

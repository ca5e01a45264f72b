"""Kills writers of a ring or a table at random moments and checks what is left behind.

Run as a program, light enough to fork thousands of times: `kill_writers.py ring|table KILLS`.
Prints how many writers were killed and how many of them died holding a lock.
"""

import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from aegaeon import _native
from aegaeon.errors import TableFull

PATH = f"/dev/shm/aegaeon-kill-{os.getpid()}"
WRITERS = 3
LOCK_OFFSET = 4096  # the first lock word of a region: right behind its header
PATIENCE_S = 5.0
STAMP = struct.Struct("<II")  # writer, sequence; a payload is one stamp again and again


def payload(writer: int, sequence: int, words: int) -> bytes:
    return STAMP.pack(writer, sequence) * words


def stamp_of(data: bytes) -> tuple[int, int]:
    """Return (writer, sequence) of a payload that must be whole."""
    assert data == data[:8] * (len(data) // 8), "torn"
    writer, sequence = STAMP.unpack_from(data)
    return writer, sequence


class Acknowledged:
    """How far each writer got, as it said itself, in memory shared with its parent."""

    def __init__(self, writers: int) -> None:
        self._words = memoryview(mmap.mmap(-1, 8 * writers)).cast("Q")

    def __getitem__(self, writer: int) -> int:
        return self._words[writer]

    def __setitem__(self, writer: int, count: int) -> None:
        self._words[writer] = count


def start_writer(write: Callable[[int], None], writer: int) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            _native.die_with_parent(signal.SIGKILL, parent)
            write(writer)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == -signal.SIGKILL, f"the writer ended by itself: {status}"


def lock_holder() -> int:
    with Path(PATH).open("rb") as file:
        file.seek(LOCK_OFFSET)
        return struct.unpack("<Q", file.read(8))[0] >> 42


def put_soon(table: _native.Table, key: bytes, value: bytes, fence: int) -> None:
    """Put for good, as soon as one of the passing entries has passed."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return table.put(key, value, 1000.0, fence)
        except TableFull:
            assert time.monotonic() < end


class RingCheck:
    """Every acknowledged record arrives, whole, in order; at most one more than acknowledged."""

    def __init__(self, writers: int) -> None:
        self.acknowledged = Acknowledged(writers)
        self.ring = _native.Ring.create(PATH, 1 << 18)
        self.received = [0] * writers

    def write(self, writer: int) -> None:
        ring = _native.Ring.attach(PATH)
        rng = random.Random(writer)
        sequence = 0
        while True:
            words = rng.choice((1, 1, 2, 8, 500, 8000))
            ring.send(payload(writer, sequence, words), PATIENCE_S)
            sequence += 1
            self.acknowledged[writer] = sequence

    def read(self) -> None:
        for record in self.ring.receive(0.0, 1 << 20):
            writer, sequence = stamp_of(record)
            assert sequence == self.received[writer], "lost, doubled or out of order"
            self.received[writer] += 1

    def killed(self, writer: int) -> None:
        self.read()
        self.read()
        acknowledged, received = self.acknowledged[writer], self.received[writer]
        assert acknowledged <= received <= acknowledged + 1, (acknowledged, received)

    def end(self) -> None:
        """The reader is not wedged, and neither is a new writer."""
        start = time.monotonic()
        _native.Ring.attach(PATH).send(b"last", PATIENCE_S)
        assert self.ring.receive(PATIENCE_S)[-1:] == [b"last"]
        assert time.monotonic() - start < PATIENCE_S


class TableCheck:
    """Entries are whole; a writer's own entry is as new as it said, or one newer."""

    def __init__(self, writers: int) -> None:
        self.acknowledged = Acknowledged(writers)
        self.table = _native.Table.create(PATH, 32, 8192)

    def write(self, writer: int) -> None:
        table = _native.Table.attach(PATH)
        rng = random.Random(writer)
        own = b"own %d" % (writer % WRITERS)
        sequence = 0
        while True:
            value = payload(writer, sequence, rng.choice((1, 8, 1000)))
            put_soon(table, own, value, writer)
            sequence += 1
            self.acknowledged[writer] = sequence
            put_soon(table, b"shared", value, 0)
            table.put_evicting(b"passing %d" % rng.randrange(100), value, 0.01)

    def read(self) -> None:
        for _, value in self.table.items():
            stamp_of(value)
        shared = self.table.get(b"shared")
        assert shared is None or stamp_of(shared)

    def killed(self, writer: int) -> None:
        value = self.table.get(b"own %d" % (writer % WRITERS))
        acknowledged = self.acknowledged[writer]
        if acknowledged == 0:
            return
        assert value is not None, "an acknowledged entry is gone"
        assert stamp_of(value) in ((writer, acknowledged - 1), (writer, acknowledged))

    def end(self) -> None:
        put_soon(self.table, b"last", b"value", 0)
        assert self.table.get(b"last") == b"value"


def run(check: RingCheck | TableCheck, kills: int) -> int:
    """Keep WRITERS writers alive, kill one after the other; return how many died with the lock."""
    rng = random.Random(kills)
    living = {writer: start_writer(check.write, writer) for writer in range(WRITERS)}
    holding = 0
    try:
        for writer in range(kills):
            end = time.monotonic() + rng.random() * 0.002
            while time.monotonic() < end:
                check.read()
            pid = living.pop(writer)
            kill(pid)
            holding += lock_holder() == pid
            check.killed(writer)
            living[writer + WRITERS] = start_writer(check.write, writer + WRITERS)
    finally:
        for pid in living.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    check.read()
    check.end()
    return holding


def main() -> int:
    kills = int(sys.argv[2])
    check = {"ring": RingCheck, "table": TableCheck}[sys.argv[1]](kills + WRITERS)
    try:
        holding = run(check, kills)
    finally:
        _native.unlink(PATH)
    sys.stdout.write(f"{kills} killed, {holding} holding the lock\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

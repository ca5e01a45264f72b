"""The copy engine as Python sees it: order, progress, cancellation, ends.

What is copied when is tested on a clock of its own by csrc/testing/copy_schedule.cpp.
"""

import contextlib
import ctypes
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon import _native
from aegaeon.errors import CopyError, CopyQueueFull

MIB = 1 << 20
SLOW = 1000  # bytes/s of a link on which nothing arrives while a test runs


class Memory:
    """Bytes at an address, which stay mapped for good: copies may outlive a failed test."""

    def __init__(self, content: bytes) -> None:
        self.bytes = mmap.mmap(-1, max(len(content), 1))
        self.bytes.write(content)
        self._first = ctypes.c_char.from_buffer(self.bytes)
        self.address = ctypes.addressof(self._first)

    def content(self) -> bytes:
        return self.bytes[:]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def engine(request):
    engine = _native.CopyEngine(threads=request.param, chunk_bytes=4096)
    yield engine
    engine.close()


@pytest.fixture
def slow():
    engine = _native.CopyEngine(chunk_bytes=4096, link_bytes_per_s=SLOW)
    yield engine
    engine.close()


def random_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def thread_names() -> list[str]:
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            names.append((task / "comm").read_text(encoding="utf-8").strip())
    return names


@pytest.mark.parametrize("size", [0, 1, 63, 4095, 4096, 4097, 3 * MIB + 17])
def test_a_copy_of_every_size_arrives(engine, size):
    source, target = Memory(random_bytes(size)), Memory(bytes(size))
    ticket = engine.submit([(target.address, source.address, size)])
    assert ticket.wait(timeout_s=20.0)
    assert ticket.is_done and not ticket.is_cancelled and not ticket.has_failed
    assert ticket.progress_bytes == ticket.total_bytes == size
    assert target.content()[:size] == source.content()[:size]
    assert engine.open_tickets == 0


def test_many_segments_are_one_copy(engine):
    source, target = Memory(random_bytes(MIB)), Memory(bytes(MIB))
    cuts = [0, *sorted(random.Random(1).sample(range(1, MIB), 700)), MIB]
    segments = [(target.address + a, source.address + a, b - a) for a, b in pairwise(cuts)]
    assert engine.submit(segments).wait(timeout_s=20.0)
    assert target.content() == source.content()


def test_no_segments_are_done_after_what_they_wait_for(engine, slow):
    assert engine.submit([]).wait(timeout_s=20.0)
    source, target = Memory(bytes(8192)), Memory(bytes(8192))
    first = slow.submit([(target.address, source.address, 8192)])
    then = slow.submit([], after=[first])
    assert not then.wait(timeout_s=0.0) and not then.is_done
    first.cancel()
    assert then.wait(timeout_s=20.0)


def test_segments_that_build_on_each_other_are_copied_in_order(engine):
    size = 2 * MIB
    start, middle, end = Memory(random_bytes(size)), Memory(bytes(size)), Memory(bytes(size))
    ticket = engine.submit(
        [(middle.address, start.address, size), (end.address, middle.address, size)]
    )
    assert ticket.wait(timeout_s=20.0)
    assert end.content() == start.content()


@pytest.mark.parametrize("shift", [1, 64, 5000])
def test_a_segment_may_move_down_over_itself(engine, shift):
    content = random_bytes(2 * MIB)
    memory = Memory(content)
    size = len(content) - shift
    assert engine.submit([(memory.address, memory.address + shift, size)]).wait(timeout_s=20.0)
    assert memory.content() == content[shift:] + content[-shift:]


def test_progress_is_true_and_never_falls():
    size = 4 * MIB
    source, target = Memory(random_bytes(size)), Memory(bytes(size))
    engine = _native.CopyEngine(threads=2, chunk_bytes=10_000, link_bytes_per_s=100_000_000)
    ticket = engine.submit([(target.address, source.address, size)])
    seen = [0]
    while not ticket.is_done:
        progress = ticket.progress_bytes
        assert progress >= seen[-1]
        start = seen[-1]
        assert target.bytes[start:progress] == source.bytes[start:progress]
        seen.append(progress)
    engine.close()
    assert len(set(seen)) > 10
    assert ticket.seconds >= size / 100_000_000


def test_waiting_for_the_first_bytes_does_not_wait_for_all():
    source, target = Memory(random_bytes(1 << 16)), Memory(bytes(1 << 16))
    engine = _native.CopyEngine(chunk_bytes=4096, link_bytes_per_s=40_960)  # 0.1 s a chunk
    ticket = engine.submit([(target.address, source.address, 1 << 16)])
    assert ticket.wait(bytes=100, timeout_s=20.0)
    assert ticket.progress_bytes >= 4096 and not ticket.is_done
    assert not ticket.wait(timeout_s=0.0)
    with pytest.raises(ValueError, match="65536 bytes; 65537 will never be in"):
        ticket.wait(bytes=65_537)
    engine.close()


def test_an_urgent_copy_overtakes_one_that_runs():
    """The bytes tell which went first, however late we look: weights are what KV left there."""
    source, target = Memory(random_bytes(4 * MIB)), Memory(bytes(8 * MIB))
    kv_place, weights_place = Memory(bytes(64)), Memory(bytes(64))
    engine = _native.CopyEngine(chunk_bytes=4096, link_bytes_per_s=40_960)  # 100 s for all of it
    prefetch = engine.submit([(target.address, source.address, 4 * MIB)], priority=2)
    assert prefetch.wait(bytes=1, timeout_s=20.0)
    gate = engine.submit([(target.address + 4 * MIB, source.address, 4 * MIB)], priority=2)
    weights = engine.submit([(weights_place.address, kv_place.address, 64)], 1, after=[gate])
    kv = engine.submit([(kv_place.address, source.address, 64)], 1, after=[gate])
    kv.raise_priority(0)
    gate.cancel()
    assert kv.wait(timeout_s=20.0) and weights.wait(timeout_s=20.0)
    assert weights_place.content()[:64] == source.content()[:64]
    assert not prefetch.is_done
    engine.close()


def test_a_copy_waits_for_what_it_names_whatever_its_priority(engine):
    size = 3 * MIB
    start, middle, end = Memory(random_bytes(size)), Memory(bytes(size)), Memory(bytes(size))
    out = engine.submit([(middle.address, start.address, size)], priority=2)
    back = engine.submit([(end.address, middle.address, size)], priority=0, after=[out, out])
    assert back.wait(timeout_s=20.0) and out.is_done
    assert end.content() == start.content()


def test_a_copy_waits_for_tickets_of_its_own_engine_only(engine, slow):
    memory = Memory(bytes(64))
    with pytest.raises(ValueError, match="of its own engine"):
        slow.submit([(memory.address, memory.address + 32, 32)], after=[engine.submit([])])


def test_nothing_touches_the_memory_of_a_cancelled_copy(engine):
    size = 2 * MIB
    source, target = Memory(b"\x55" * size), Memory(bytes(size))
    order = random.Random(5)
    for _ in range(100):
        ticket = engine.submit([(target.address, source.address, size)])
        ticket.wait(bytes=order.randrange(size + 1), timeout_s=order.choice([0.0, 0.0001, 1.0]))
        ticket.cancel()
        ctypes.memset(target.address, 0xAA, size)
        progress = ticket.progress_bytes
        assert ticket.is_done or ticket.is_cancelled
        assert ticket.is_done == (progress == size)
        assert engine.submit([]).wait(timeout_s=20.0)
        assert target.content() == b"\xaa" * size
        assert ticket.progress_bytes == progress


def test_a_cancelled_copy_ends_its_waits_and_stays_cancelled(slow):
    source, target = Memory(bytes(MIB)), Memory(bytes(MIB))
    ticket = slow.submit([(target.address, source.address, MIB)])
    outcome = []
    waiter = threading.Thread(target=lambda: outcome.append(ticket.wait(timeout_s=60.0)))
    waiter.start()
    ticket.cancel()
    ticket.cancel()
    waiter.join(20.0)
    assert outcome == [False]
    assert ticket.is_cancelled and not ticket.is_done
    assert slow.open_tickets == 0


def test_closing_cancels_what_is_open_and_stops_the_threads():
    before = thread_names().count("copy")
    engine = _native.CopyEngine(threads=3, chunk_bytes=4096, link_bytes_per_s=SLOW)
    assert thread_names().count("copy") == before + 3
    source, target = Memory(b"x" * MIB), Memory(bytes(MIB))
    tickets = [engine.submit([(target.address, source.address, MIB)]) for _ in range(5)]
    engine.close()
    engine.close()
    ctypes.memset(target.address, 0, MIB)
    assert thread_names().count("copy") == before
    assert all(ticket.is_cancelled and not ticket.wait(timeout_s=1.0) for ticket in tickets)
    with pytest.raises(CopyError, match="has been closed"):
        engine.submit([])


def test_an_engine_without_owner_stops_with_its_last_ticket():
    before = thread_names().count("copy")
    engine = _native.CopyEngine()
    ticket = engine.submit([])
    del engine
    assert ticket.wait(timeout_s=20.0)
    del ticket
    assert thread_names().count("copy") == before


def test_a_dropped_ticket_is_copied_nevertheless(engine):
    source, target = Memory(random_bytes(MIB)), Memory(bytes(MIB))
    engine.submit([(target.address, source.address, MIB)], priority=0)
    end = time.monotonic() + 20.0
    while engine.open_tickets and time.monotonic() < end:
        time.sleep(0.001)
    assert target.content() == source.content()


def test_the_queue_is_bounded(slow):
    memory = Memory(bytes(8192))
    segments = [(memory.address, memory.address + 4096, 4096)]
    tickets = [slow.submit(segments) for _ in range(4096)]
    with pytest.raises(CopyQueueFull, match="4096 copies are open"):
        slow.submit(segments)
    tickets[100].cancel()
    slow.submit(segments)


@pytest.mark.parametrize(
    ("segments", "complaint"),
    [
        ([(0, 4096, 1)], "null address"),
        ([(4096, 0, 1)], "null address"),
        ([(2**64 - 10, 4096, 11)], "beyond the address space"),
        ([(4096, 2**64 - 10, 11)], "beyond the address space"),
        ([(4097, 4096, 2)], "overlaps itself upwards"),
    ],
)
def test_bad_segments_are_refused(slow, segments, complaint):
    with pytest.raises(ValueError, match=complaint):
        slow.submit(segments)
    assert slow.open_tickets == 0


@pytest.mark.parametrize("segments", [[(1, 2)], [(-1, 4096, 1)], [("a", 1, 1)], [None], None])
def test_segments_of_another_shape_are_refused(slow, segments):
    with pytest.raises(TypeError):
        slow.submit(segments)


def test_bad_options_are_refused(slow):
    with pytest.raises(ValueError, match="threads is 0"):
        _native.CopyEngine(threads=0)
    with pytest.raises(ValueError, match="threads is 65"):
        _native.CopyEngine(threads=65)
    with pytest.raises(ValueError, match="chunk_bytes is 0"):
        _native.CopyEngine(chunk_bytes=0)
    with pytest.raises(ValueError, match="priority 3 is out of range"):
        slow.submit([], priority=3)
    with pytest.raises(ValueError, match="priority 3 is out of range"):
        slow.submit([]).raise_priority(3)
    with pytest.raises(ValueError, match="own engine"):
        slow.submit([], after=[None])


def test_a_thread_that_cannot_start_is_an_error_at_once():
    program = """
import resource
from aegaeon import _native
from aegaeon.errors import CopyError
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (20 << 20),) * 2)
try:
    _native.CopyEngine(threads=64)
except CopyError as error:
    print(error)
"""
    if resource.getrlimit(resource.RLIMIT_STACK)[0] not in range(1 << 20, 1 << 30):
        pytest.skip("threads get no stack of some MiB here, which the test exhausts")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "of 64 could not be started" in done.stdout


def test_a_forked_child_is_told_and_can_end(slow):
    memory = Memory(bytes(2 * MIB))
    ticket = slow.submit([(memory.address, memory.address + MIB, MIB)])
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for use in (ticket.cancel, lambda: slow.submit([]), lambda: ticket.wait(timeout_s=9)):
                with pytest.raises(CopyError, match="after a fork"):
                    use()
            slow.close()
            del slow, ticket, use
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not ticket.is_cancelled


def test_a_signal_handler_may_end_a_wait(slow):
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    memory = Memory(bytes(2 * MIB))
    ticket = slow.submit([(memory.address, memory.address + MIB, MIB)])
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Interrupted):
            ticket.wait(timeout_s=60.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


BLOCK = 3000
BLOCKS = 12
COPIES = st.tuples(
    *(st.integers(0, BLOCKS - 1), st.integers(0, BLOCKS - 1), st.integers(0, BLOCK)),
    *(st.integers(0, 2), st.booleans()),
)


@settings(max_examples=60)
@given(copies=st.lists(COPIES, max_size=25), threads=st.integers(1, 3), link=st.booleans())
def test_random_copies_leave_what_plain_ones_in_order_leave(copies, threads, link):
    """Each waits for the last that touched its blocks, as the engine asks of its users."""
    memory = Memory(random_bytes(BLOCK * BLOCKS))
    expected = bytearray(memory.content())
    engine = _native.CopyEngine(threads, 700, 200_000_000 if link else 0)
    touched: dict[int, list[_native.CopyTicket]] = {}
    for to, source, size, priority, is_outward in copies:
        if to == source:
            continue
        after = [ticket for block in (to, source) for ticket in touched.get(block, [])]
        segment = (memory.address + to * BLOCK, memory.address + source * BLOCK, size)
        ticket = engine.submit([segment], priority, after, is_outward)
        touched[to] = [ticket]
        touched[source] = [ticket]
        expected[to * BLOCK : to * BLOCK + size] = expected[source * BLOCK : source * BLOCK + size]
    assert all(ticket.wait(timeout_s=20.0) for last in touched.values() for ticket in last)
    engine.close()
    assert memory.content() == bytes(expected)

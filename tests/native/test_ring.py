"""The ring as Python sees it: order, bounds, waits, wake-ups, ends."""

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from aegaeon import _native
from aegaeon.errors import RecordTooLarge, RegionError, RingClosed, RingFull

MIB = 1 << 20


@pytest.fixture
def ring(region_path):
    return _native.Ring.create(region_path, 1 << 16)


def run_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; the parent must wait for the pid."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def exit_status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def receive_all(ring: _native.Ring, count: int, deadline_s: float = 20.0) -> list[bytes]:
    records: list[bytes] = []
    end = time.monotonic() + deadline_s
    while len(records) < count and time.monotonic() < end:
        records += ring.receive(0.1)
    return records


def test_records_of_every_length_arrive_whole_and_in_order(ring, region_path):
    sender = _native.Ring.attach(region_path)
    sent = [bytes([length % 251]) * length for length in [0, 1, 7, 8, 9, 63, 64, 4096, 30_000]]
    for _ in range(50):  # many times around the ring
        for record in sent:
            sender.send(record)
        assert ring.receive(1.0) == sent
    assert ring.pending_bytes == 0


def test_a_record_of_one_mebibyte_arrives(region_path):
    ring = _native.Ring.create(region_path, 4 * MIB)
    record = os.urandom(MIB)
    _native.Ring.attach(region_path).send(record)
    assert ring.receive(1.0) == [record]


def test_a_record_over_one_mebibyte_or_over_the_ring_is_refused(ring, region_path):
    with pytest.raises(RecordTooLarge, match="takes up to 65528"):
        ring.send(b"x" * (1 << 16))
    large = _native.Ring.create(region_path + "-large", 4 * MIB)
    try:
        with pytest.raises(RecordTooLarge, match="takes up to 1048576"):
            large.send(b"x" * (MIB + 1))
    finally:
        _native.unlink(region_path + "-large")


def test_a_ring_can_be_filled_to_its_last_byte(ring):
    for record in (b"x" * 65_528, b"y" * 65_528):
        ring.send(record)
        with pytest.raises(RingFull):
            ring.send(b"")
        assert ring.receive(0.0) == [record]


def test_capacity_is_rounded_up_to_a_power_of_two(region_path):
    assert _native.Ring.create(region_path, 5000).capacity_bytes == 8192


def test_receive_takes_no_more_than_it_is_asked_for(ring):
    for number in range(5):
        ring.send(bytes([number]))
    assert ring.receive(0.0, max_records=2) == [b"\0", b"\1"]
    assert ring.receive(0.0) == [b"\2", b"\3", b"\4"]


def test_an_empty_ring_gives_nothing_after_the_timeout(ring):
    start = time.monotonic()
    assert ring.receive(0.12) == []
    assert time.monotonic() - start >= 0.12


def test_a_full_ring_is_an_error_after_the_timeout(ring):
    ring.send(b"x" * 40_000)
    with pytest.raises(RingFull, match="no room for 30000 bytes"):
        ring.send(b"x" * 30_000)
    start = time.monotonic()
    with pytest.raises(RingFull):
        ring.send(b"x" * 30_000, timeout_s=0.12)
    assert time.monotonic() - start >= 0.12
    ring.receive(0.0)
    ring.send(b"x" * 30_000)


def test_a_sender_waits_until_the_reader_makes_room(ring, region_path):
    ring.send(b"x" * 60_000)
    pid = run_child(lambda: _native.Ring.attach(region_path).send(b"y" * 60_000, timeout_s=20.0))
    assert [record[:1] for record in receive_all(ring, 2)] == [b"x", b"y"]
    assert exit_status(pid) == 0


def test_wake_ends_a_wait_of_the_reader(ring):
    thread = threading.Timer(0.05, ring.wake)
    thread.start()
    start = time.monotonic()
    assert ring.receive(20.0) == []
    assert time.monotonic() - start < 10.0
    thread.join()


def test_wake_before_the_wait_counts_once(ring):
    ring.wake()
    ring.wake()
    start = time.monotonic()
    assert ring.receive(20.0) == []
    assert time.monotonic() - start < 10.0
    assert ring.receive(0.06) == []
    assert time.monotonic() - start >= 0.06


def test_senders_are_told_when_the_reader_closes(ring, region_path):
    sender = _native.Ring.attach(region_path)
    ring.close()
    ring.close()
    with pytest.raises(RingClosed, match="closed by its reader"):
        sender.send(b"x")
    with pytest.raises(RingClosed, match="this end"):
        ring.receive(1.0)


def test_close_ends_a_wait_in_another_thread(ring):
    outcomes = []

    def wait() -> None:
        try:
            outcomes.append(ring.receive(20.0))
        except RingClosed as error:
            outcomes.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while_waiting = time.monotonic() + 0.05
    while time.monotonic() < while_waiting:
        pass
    ring.close()
    thread.join(10.0)
    assert isinstance(outcomes[0], RingClosed)


def test_a_sender_that_closes_leaves_the_ring_open(ring, region_path):
    sender = _native.Ring.attach(region_path)
    sender.close()
    with pytest.raises(RingClosed):
        sender.send(b"x")
    _native.Ring.attach(region_path).send(b"y")
    assert ring.receive(1.0) == [b"y"]


def test_unlink_tells_the_senders_of_the_old_ring(ring, region_path):
    sender = _native.Ring.attach(region_path)
    ring.send(b"before")
    assert _native.unlink(region_path)
    assert not _native.unlink(region_path)
    with pytest.raises(RingClosed):
        sender.send(b"x")
    assert ring.receive(1.0) == [b"before"]


def test_a_dead_reader_is_named_when_the_ring_is_full(region_path):
    assert exit_status(run_child(lambda: _native.Ring.create(region_path, 4096))) == 0
    sender = _native.Ring.attach(region_path)
    with pytest.raises(RingClosed, match="is dead"):
        for _ in range(100):
            sender.send(b"x" * 1000)


def test_a_reader_that_nobody_has_reaped_is_dead_too(region_path):
    pid = run_child(lambda: _native.Ring.create(region_path, 4096))
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(RingClosed, match=f"pid {pid}, is dead"):
        for _ in range(100):
            _native.Ring.attach(region_path).send(b"x" * 1000)
    assert exit_status(pid) == 0


def test_only_the_creating_process_receives(ring, region_path):
    with pytest.raises(RegionError, match="only the process that created"):
        _native.Ring.attach(region_path).receive(0.0)

    def child() -> None:
        with pytest.raises(RegionError):
            ring.receive(0.0)
        ring.send(b"from the child")
        ring.close()  # of a copy: must not close the parent's ring

    assert exit_status(run_child(child)) == 0
    ring.send(b"from the parent")
    assert ring.receive(1.0) == [b"from the child", b"from the parent"]


def test_a_second_thread_in_receive_is_refused(ring):
    entered = threading.Event()

    def wait() -> None:
        entered.set()
        ring.receive(20.0)

    thread = threading.Thread(target=wait)
    thread.start()
    entered.wait()
    with pytest.raises(RuntimeError, match="another thread"):
        for _ in range(1000):
            ring.receive(0.01)
    ring.wake()
    thread.join()


def test_a_signal_handler_runs_and_may_end_a_wait(ring):
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Interrupted):
            ring.receive(20.0)
        ring.send(b"x" * 60_000)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Interrupted):
            ring.send(b"x" * 60_000, timeout_s=20.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_many_writers_in_processes_and_threads_lose_nothing(ring, region_path):
    def send_from_two_threads(first: int) -> None:
        sender = _native.Ring.attach(region_path)

        def send(writer: int) -> None:
            for number in range(1000):
                sender.send(bytes([writer]) + number.to_bytes(4, "little") * 30, timeout_s=20.0)

        threads = [threading.Thread(target=send, args=(first + k,)) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    pids = [run_child(lambda first=first: send_from_two_threads(first)) for first in (0, 2, 4)]
    seen = dict.fromkeys(range(6), 0)
    for record in receive_all(ring, 6000):
        writer, number = record[0], record[1:5]
        assert record[1:] == number * 30
        assert int.from_bytes(number, "little") == seen[writer]
        seen[writer] += 1
    assert set(seen.values()) == {1000}
    assert [exit_status(pid) for pid in pids] == [0, 0, 0]


def test_no_wake_up_is_lost(ring, region_path):
    """A lost one would cost a whole 50 ms wait; a busy machine explains a few, not many."""
    rounds = 3000
    back = _native.Ring.create(region_path + "-back", 4096)

    def echo() -> None:
        inbox = _native.Ring.create(region_path + "-there", 4096)
        outbox = _native.Ring.attach(region_path + "-back")
        outbox.send(b"ready")
        for _ in range(rounds):
            outbox.send(inbox.receive(10.0)[0])

    try:
        pid = run_child(echo)
        assert back.receive(10.0) == [b"ready"]
        there = _native.Ring.attach(region_path + "-there")
        late = 0
        for _ in range(rounds):
            start = time.monotonic()
            there.send(b"ping")
            assert back.receive(10.0) == [b"ping"]
            late += time.monotonic() - start > 0.045
        assert exit_status(pid) == 0
        assert late <= rounds // 100
    finally:
        _native.unlink(region_path + "-back")
        _native.unlink(region_path + "-there")

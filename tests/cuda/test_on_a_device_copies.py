"""Copies to, from and within a CUDA device, and its memory in the hands of two processes: on the
stand-in for one, in every order that a runtime may choose, and on cuda:0. No torch need know it."""

import ctypes
import random
from contextlib import contextmanager

import pytest

from aegaeon import _native
from aegaeon.errors import DeviceError
from tests.support.cuda_device import KINDS
from tests.support.cuda_peer import Peer, started

MIB = 1 << 20
CHUNK = 64 << 10
WAIT_S = 30.0
SIZES = (1, 7, 4096, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5, 2 * MIB + 3)


class Host:
    """Memory of this process, pages of its own."""

    def __init__(self, content):
        self.size = len(content)
        self._bytes = ctypes.create_string_buffer(self.size + 2 * 4096)
        self.address = -(-ctypes.addressof(self._bytes) // 4096) * 4096
        ctypes.memmove(self.address, content, self.size)

    @property
    def content(self):
        return ctypes.string_at(self.address, self.size)


def random_bytes(size, seed=0):
    return random.Random(seed).randbytes(size)


def ended(ticket):
    assert ticket.wait(timeout_s=WAIT_S), ticket.failure or "not in time"
    return ticket


def fill(engine, memory, content):
    """Have the device's memory begin with `content`."""
    source = Host(content)
    ended(engine.submit([(memory.address, source.address, source.size)], priority=0))


def held(engine, memory, size):
    """What the device's memory begins with."""
    target = Host(bytes(size))
    out = engine.submit([(target.address, memory.address, size)], priority=0, is_outward=True)
    ended(out)
    return target.content


@pytest.mark.parametrize("is_pinned", [True, False])
def test_bytes_of_every_size_go_in_and_out(copying, is_pinned):
    engine = copying.copy_engine(CHUNK)
    memory = copying.device.allocate(sum(SIZES) + 64 * len(SIZES))
    source, target = Host(random_bytes(sum(SIZES))), Host(bytes(sum(SIZES)))
    if is_pinned:
        assert copying.device.pin(source.address, source.size) == ""
        assert copying.device.pin(target.address, target.size) == ""
    places, at, there = [], 0, memory.address + 13
    for size in SIZES:
        places.append((there, at, size))
        at, there = at + size, there + size + 31
    came = [engine.submit([(to, source.address + at, size)]) for to, at, size in places]
    back = [(target.address + at, there, size) for there, at, size in places]
    ended(engine.submit(back, after=came, is_outward=True))
    assert target.content == source.content
    copying.device.unpin(source.address)
    copying.device.unpin(target.address)


def test_new_memory_is_zeroed(copying):
    engine = copying.copy_engine(CHUNK)
    memory = copying.device.allocate(MIB + 5)
    assert held(engine, memory, MIB + 5) == bytes(MIB + 5)


def test_segments_that_build_on_each_other_are_copied_in_order(copying):
    engine = copying.copy_engine(CHUNK)
    memory = copying.device.allocate(4 * CHUNK)
    content = random_bytes(2 * CHUNK)
    source, base = Host(content), memory.address
    segments = [
        (base, source.address, 2 * CHUNK),
        (base + 2 * CHUNK, base, 2 * CHUNK),
        (base, source.address, CHUNK),
        (base + CHUNK, base + 2 * CHUNK, CHUNK),
    ]
    ended(engine.submit(segments))
    assert held(engine, memory, 4 * CHUNK) == content[:CHUNK] * 2 + content


@pytest.mark.parametrize("shift", [1, 4096, CHUNK - 3, CHUNK, 5 * CHUNK])
def test_memory_moves_down_over_itself(copying, shift):
    engine = copying.copy_engine(CHUNK)
    size = 8 * CHUNK + 7
    memory, content = copying.device.allocate(size), random_bytes(size)
    fill(engine, memory, content)
    ended(engine.submit([(memory.address, memory.address + shift, size - shift)]))
    assert held(engine, memory, size - shift) == content[shift:]


def test_an_urgent_copy_overtakes_one_that_runs(copying):
    engine = copying.copy_engine(CHUNK)
    size = 96 * MIB
    memory, source = copying.device.allocate(size + 4096), Host(bytes(size))
    slow = engine.submit([(memory.address, source.address, size)], priority=2)
    assert slow.wait(bytes=1, timeout_s=WAIT_S), slow.failure
    urgent = ended(engine.submit([(memory.address + size, source.address, 4096)], priority=0))
    assert slow.progress_bytes < size and urgent.is_done
    slow.cancel()


def test_a_copy_that_others_wait_for_becomes_as_urgent(copying):
    engine = copying.copy_engine(CHUNK)
    size = 64 * MIB
    memory, source = copying.device.allocate(2 * size), Host(bytes(size))
    first = engine.submit([(memory.address, source.address, size)], priority=2)
    other = engine.submit([(memory.address + size, source.address, size)], priority=1)
    target = Host(bytes(8))
    ended(
        engine.submit(
            [(target.address, memory.address, 8)], priority=0, after=[first], is_outward=True
        )
    )
    assert first.is_done and not other.is_done
    other.cancel()


def test_nothing_touches_the_memory_of_a_cancelled_copy(copying):
    engine = copying.copy_engine(CHUNK)
    size = 32 * MIB
    memory, source = copying.device.allocate(size), Host(random_bytes(size))
    ticket = engine.submit([(memory.address, source.address, size)], priority=2)
    assert ticket.wait(bytes=CHUNK, timeout_s=WAIT_S), ticket.failure
    ticket.cancel()
    progress = ticket.progress_bytes
    assert ticket.is_cancelled or progress == size
    assert held(engine, memory, progress) == source.content[:progress]
    fill(engine, memory, bytes(size))
    assert held(engine, memory, size) == bytes(size)
    assert ticket.progress_bytes == progress


def test_a_closed_engine_leaves_memory_alone(copying):
    size = 32 * MIB
    memory, source = copying.device.allocate(size), Host(random_bytes(size))
    first, second = (copying.copy_engine(CHUNK) for _ in range(2))
    ticket = first.submit([(memory.address, source.address, size)])
    first.close()
    assert ticket.is_cancelled or ticket.is_done
    fill(second, memory, bytes(size))
    assert held(second, memory, size) == bytes(size)


@pytest.mark.parametrize("seed", range(4))
def test_random_copies_leave_what_plain_ones_in_order_leave(copying, seed):
    """Three places in either memory; a copy names those before it that it shares bytes with."""
    engine = copying.copy_engine(CHUNK)
    choose, size = random.Random(seed), 3 * CHUNK
    memory = copying.device.allocate(3 * size)
    hosts = [Host(random_bytes(size, seed=10 * seed + i)) for i in range(3)]
    device = [bytearray(size) for _ in range(3)]
    host = [bytearray(one.content) for one in hosts]
    done = []  # (ticket, the places that it reads and writes)
    for _ in range(60):
        a, b, bytes_ = choose.randrange(3), choose.randrange(3), choose.randint(1, size)
        start, to = choose.randint(0, size - bytes_), choose.randint(0, size - bytes_)
        way = choose.choice(["in", "out", "within"])
        if way == "within" and a == b:
            continue
        there = memory.address + b * size
        if way == "in":
            segment = (there + to, hosts[a].address + start, bytes_)
            touched = {("host", a), ("device", b)}
            device[b][to : to + bytes_] = host[a][start : start + bytes_]
        elif way == "out":
            segment = (hosts[a].address + to, there + start, bytes_)
            touched = {("host", a), ("device", b)}
            host[a][to : to + bytes_] = device[b][start : start + bytes_]
        else:
            segment = (there + to, memory.address + a * size + start, bytes_)
            touched = {("device", a), ("device", b)}
            device[b][to : to + bytes_] = device[a][start : start + bytes_]
        after = [ticket for ticket, places in done if places & touched]
        ticket = engine.submit([segment], choose.randrange(3), after=after, is_outward=way == "out")
        done.append((ticket, touched))
    for ticket, _ in done:
        ended(ticket)
    assert [one.content for one in hosts] == [bytes(one) for one in host]
    assert held(engine, memory, 3 * size) == b"".join(device)


def test_memory_that_is_not_the_devices_is_refused(copying):
    engine = copying.copy_engine(CHUNK)
    memory, host = copying.device.allocate(4096), Host(bytes(8192))
    beyond = engine.submit([(memory.address, host.address, 8192)])
    assert not beyond.wait(timeout_s=WAIT_S) and "beyond the device's memory" in beyond.failure
    neither = engine.submit([(host.address, host.address + 4096, 4096)])
    assert not neither.wait(timeout_s=WAIT_S) and "neither end" in neither.failure
    assert held(engine, memory, 4096) == bytes(4096)


# Two processes


class Taker:
    """In another process: copies from memory that it is given a handle of."""

    def __init__(self):
        self.device = _native.CudaDevice(0)
        self.engine = self.device.copy_engine(CHUNK)
        self.peer = None

    def open(self, handle, size):
        self.peer = self.device.open(handle, size)

    def take(self, start, size):
        memory = self.device.allocate(size)
        taken = self.engine.submit([(memory.address, self.peer.address + start, size)], priority=0)
        found = Host(bytes(size))
        segment = (found.address, memory.address, size)
        ended(self.engine.submit([segment], after=[taken], is_outward=True))
        ended(taken)
        return found.content


# A process takes seconds to start, in whatever order it copies.
IN_ONE_ORDER = pytest.mark.parametrize("copying", KINDS, indirect=True)


@contextmanager
def taker():
    one = Taker()
    yield one
    one.engine.close()
    one.peer = one.engine = one.device = None


@IN_ONE_ORDER
def test_another_process_takes_what_a_handle_names(copying):
    engine = copying.copy_engine(CHUNK)
    content = random_bytes(3 * CHUNK + 5)
    memory = copying.device.allocate(len(content))
    fill(engine, memory, content)
    peer = Peer(copying.kind, taker)
    with started(peer):
        peer.call("open", memory.handle(), len(content))
        assert peer.call("take", 0, len(content)) == content
        # What is written later is seen as well: it is the same memory.
        fill(engine, memory, content[::-1])
        assert peer.call("take", 17, CHUNK) == content[::-1][17 : 17 + CHUNK]
        peer.stop()


@IN_ONE_ORDER
def test_a_taker_that_dies_takes_nothing_with_it(copying):
    engine = copying.copy_engine(CHUNK)
    content = random_bytes(CHUNK)
    memory = copying.device.allocate(CHUNK)
    fill(engine, memory, content)
    peer = Peer(copying.kind, taker)
    with started(peer):
        peer.call("open", memory.handle(), CHUNK)
        peer.stop(is_killed=True)
    assert held(engine, memory, CHUNK) == content


def test_handles_that_name_nothing_to_open_are_refused(copying):
    memory = copying.device.allocate(4096)
    handle = memory.handle()
    for wrong, complaint in (
        (handle, "open another process's device memory"),  # it is our own
        (handle[:-1], "has 64 bytes, not 63"),
        (b"", "has 64 bytes, not 0"),
    ):
        with pytest.raises(DeviceError, match=complaint):
            copying.device.open(wrong, 4096)

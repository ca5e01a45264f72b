"""KV over TCP: what comes is what was sent, or nothing is; whoever breaks it, within a bound."""

import os
import socket
import threading
import time

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon.engine.exchange import KvExchange, Room
from aegaeon.errors import Overloaded
from aegaeon.handles import KvStream
from aegaeon.instance import kv_share
from aegaeon.instance.kv_share import KvShare
from aegaeon.instance.kv_wire import CHUNK_BYTES, slices
from aegaeon.instance.pulls import MAX_PULLS, Pulls
from aegaeon.scheduler.moving import Links
from aegaeon.types import Cancel, KvHandle, Transfer
from tests.support.specs import make_request
from tests.support.wire import Wire

WITHIN_S = 20.0  # generous: nothing here is to take long, however busy the machine is


class Memory(KvExchange):
    """Rooms of parts of `part_bytes`, not all beside each other."""

    def __init__(self, part_bytes):
        self.part_bytes, self.rooms = part_bytes, 0

    def expose(self, request):
        raise NotImplementedError

    def make_room(self, model, kv):
        data, views = bytearray(kv.kv_bytes), []
        for at in range(0, kv.kv_bytes, self.part_bytes):
            views.append(memoryview(data)[at : at + self.part_bytes])
        self.rooms += 1
        return Room(data, kv, [1], views)

    def free(self, room):
        self.rooms -= 1
        room.blocks = []


class Ends:
    """Both ends, and what is between them."""

    def __init__(self, data, part_bytes=3000, send_bytes=7000, within_s=WITHIN_S):
        self.data = data
        self.share = KvShare("127.0.0.1", Links())
        self.memory = Memory(part_bytes)
        self.woken = threading.Event()
        self.pulls = Pulls(self.memory, self.woken.set)
        view = memoryview(data)
        views = [view[at : at + send_bytes] for at in range(0, len(data), send_bytes)]
        self.stream = self.share.offer(views, within_s)

    def transfer(self, name="r", **changes):
        stream = msgspec.structs.replace(self.stream, **changes)
        kv = KvHandle(owner=0, blocks=(), cached_tokens=1, kv_bytes=len(self.data), stream=stream)
        return Transfer(make_request(name, "a"), kv, "sender", 0.0)

    def pull(self, within_s=WITHIN_S, name="r", **changes):
        """Return how it ended."""
        self.woken.clear()
        self.pulls.begin(self.transfer(name, **changes), within_s)
        return self.ended()

    def ended(self):
        assert self.woken.wait(WITHIN_S)
        (pull,) = self.pulls.done()
        return pull

    def close(self):
        self.pulls.close()
        self.share.close()
        assert not any(t.name.startswith("kv ") for t in threading.enumerate() if t.is_alive())


@pytest.fixture
def make_ends():
    made = []

    def make(size=100_000, **options):
        made.append(Ends(os.urandom(size), **options))
        return made[-1]

    yield make
    for ends in made:
        ends.close()


def assert_came(ends, pull):
    assert pull.failure == ""
    assert bytes(pull.room.shape) == bytes(ends.data)
    assert ends.share.withdraw(ends.stream)


def assert_broken(ends, pull, why=""):
    assert why in pull.failure and pull.failure
    ends.pulls.free(pull)
    assert ends.memory.rooms == 0
    assert not ends.share.withdraw(ends.stream)  # nobody was told that it is his


@pytest.mark.parametrize("size", [1, 2999, 3000, 100_001, CHUNK_BYTES, 2 * CHUNK_BYTES + 12_345])
def test_what_comes_is_what_was_sent(make_ends, size):
    ends = make_ends(size)
    assert_came(ends, ends.pull())


def test_a_link_is_measured_by_what_goes_over_it(make_ends):
    ends = make_ends(1 << 20)
    assert_came(ends, ends.pull())
    deadline_s = time.monotonic() + WITHIN_S
    while ends.share._links.byte_s is None and time.monotonic() < deadline_s:
        time.sleep(0.005)
    assert ends.share._links.byte_s > 0.0


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(0, 300), st.integers(0, 300))
def test_slices_are_the_bytes_of_all_views(sizes, at, size):
    data = bytes(range(256)) * 2
    views, start = [], 0
    for one in sizes:
        views.append(memoryview(data)[start : start + one])
        start += one
    assert b"".join(slices(views, at, size)) == data[:start][at : at + size]


def test_who_does_not_know_the_token_gets_nothing(make_ends):
    ends = make_ends()
    wrong = ends.pull(token=b"x" * 16)
    assert wrong.failure
    ends.pulls.free(wrong)
    unknown = ends.pull(name="s", **{"token": ends.stream.token})
    assert unknown.failure == ""
    ends.pulls.free(unknown)
    other = msgspec.structs.replace(ends.stream, name=ends.stream.name ^ 1)
    ends.stream = other
    assert ends.pull(name="t").failure


def test_what_was_withdrawn_is_gone(make_ends):
    ends = make_ends()
    ends.share.withdraw(ends.stream)
    assert_broken(ends, ends.pull())


def wired(ends, fault):
    wire = Wire(int(ends.stream.address.rpartition(":")[2]), fault)
    ends.stream = msgspec.structs.replace(ends.stream, address=wire.address)
    return wire


@pytest.mark.parametrize("at", [0, 10, 24, 60, 5000, 99_999])
def test_a_wire_that_is_cut_or_says_no_more_ends_it(make_ends, at):
    ends = make_ends()
    wire = wired(ends, lambda count, data: data[: at - count] if count < at else None)
    assert_broken(ends, ends.pull(within_s=0.5))
    wire.close()


@pytest.mark.parametrize("at", [3, 20, 30, 80, 50_000, 100_060])
def test_a_byte_that_changes_on_its_way_is_found(make_ends, at):
    ends = make_ends()

    def flip(count, data):
        if count <= at < count + len(data):
            changed = bytearray(data)
            changed[at - count] ^= 0x40
            return bytes(changed)
        return data

    wire = wired(ends, flip)
    assert_broken(ends, ends.pull())
    wire.close()


def test_a_wire_that_says_nothing_ends_it_in_time(make_ends):
    ends = make_ends(4 << 20)
    still = threading.Event()

    def stall(count, data):
        if count > 1 << 20:
            still.wait(WITHIN_S)
        return data

    wire = wired(ends, stall)
    assert_broken(ends, ends.pull(within_s=0.3))
    still.set()
    wire.close()


def test_one_that_drips_is_over_when_its_time_is(make_ends):
    ends = make_ends(1 << 20)
    wire = wired(ends, lambda _count, data: (time.sleep(0.02), data[:100])[1])
    assert_broken(ends, ends.pull(within_s=0.3))
    wire.close()


@pytest.mark.parametrize("end", ["withdraw", "cancel"])
def test_it_may_be_ended_from_both_sides_in_the_midst(make_ends, end):
    ends = make_ends(4 << 20)
    going, on = threading.Event(), threading.Event()

    def hold(_count, data):
        going.set()
        on.wait(WITHIN_S)
        return data

    wire = wired(ends, hold)
    ends.pulls.begin(ends.transfer(), WITHIN_S)
    assert going.wait(WITHIN_S)
    assert ("r", 0, 0) in ends.pulls
    if end == "withdraw":
        assert not ends.share.withdraw(ends.stream)
    else:
        ends.pulls.cancel(Cancel("r"))
    on.set()
    pull = ends.ended()
    assert pull.is_unwanted is (end == "cancel")
    assert_broken(ends, pull)
    assert ("r", 0, 0) not in ends.pulls
    wire.close()


def test_nobody_at_the_address_is_known_at_once(make_ends):
    ends = make_ends()
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    ends.stream = msgspec.structs.replace(ends.stream, address=address)
    assert_broken(ends, ends.pull())


@pytest.mark.parametrize("address", ["", "here", "127.0.0.1:", "127.0.0.1:x", ":::", "a:99999999"])
def test_an_address_that_is_none_is_no_harm(make_ends, address):
    ends = make_ends()
    ends.stream = msgspec.structs.replace(ends.stream, address=address)
    assert_broken(ends, ends.pull())


def test_as_many_come_at_a_time_as_may(make_ends):
    ends = make_ends()
    on = threading.Event()
    wire = wired(ends, lambda _count, data: (on.wait(WITHIN_S), data)[1])
    for number in range(MAX_PULLS):
        ends.pulls.begin(ends.transfer(f"r{number}"), WITHIN_S)
    with pytest.raises(Overloaded, match="offer it again"):
        ends.pulls.begin(ends.transfer("more"), WITHIN_S)
    on.set()
    count, deadline_s = 0, time.monotonic() + WITHIN_S
    while count < MAX_PULLS and time.monotonic() < deadline_s:
        for pull in ends.pulls.done():
            count += pull.failure == ""
            ends.pulls.free(pull)
        time.sleep(0.005)
    assert count == MAX_PULLS
    wire.close()


def test_more_connections_than_are_served_are_closed(make_ends, monkeypatch):
    monkeypatch.setattr(kv_share, "MAX_CONNECTIONS", 0)
    ends = make_ends()
    assert_broken(ends, ends.pull())


def test_strangers_that_say_nothing_keep_nobody_out(make_ends):
    ends = make_ends()
    host, _, port = ends.share.address.rpartition(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(kv_share.MAX_CONNECTIONS)]
    for stranger in idle:
        stranger.settimeout(WITHIN_S)
        assert stranger.recv(1)
    assert_came(ends, ends.pull())
    for stranger in idle:
        stranger.close()


def test_one_that_cannot_be_served_ends_no_listening(make_ends, monkeypatch):
    ends, line = make_ends(), kv_share.Line
    refused = threading.Event()

    def refuse(*_args):
        refused.set()
        raise OSError("gone")

    monkeypatch.setattr(kv_share, "Line", refuse)
    host, _, port = ends.share.address.rpartition(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.settimeout(WITHIN_S)
        assert refused.wait(WITHIN_S)
        monkeypatch.setattr(kv_share, "Line", line)
    assert_came(ends, ends.pull())


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_bytes_from_strangers_harm_neither_end(data, is_half):
    ends = Ends(b"k" * 5000)
    host, _, port = ends.share.address.rpartition(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(data)
        if not is_half:
            stranger.shutdown(socket.SHUT_WR)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(data)

        teller = threading.Thread(target=answer)
        teller.start()
        right = ends.stream
        ends.stream = KvStream(f"127.0.0.1:{listener.getsockname()[1]}", right.name, right.token)
        bad = ends.pull()
        teller.join(WITHIN_S)
        assert bad.failure
        ends.pulls.free(bad)
        ends.stream = right
    assert_came(ends, ends.pull())
    ends.close()

"""The table as Python sees it: leases, fences, bounds, eviction, many processes."""

import os
import time

import pytest

from aegaeon import _native
from aegaeon.errors import RecordTooLarge, RegionError, StaleIncarnation, TableFull

LONG_S = 1000.0


@pytest.fixture
def table(region_path):
    return _native.Table.create(region_path, 64, 256)


def wait_until_gone(table: _native.Table, key: bytes) -> None:
    end = time.monotonic() + 10.0
    while table.get(key) is not None:
        assert time.monotonic() < end


def test_values_of_every_length_come_back(table, region_path):
    other = _native.Table.attach(region_path)
    for length in [*range(20), 255, 256]:
        key, value = bytes([length + 1 & 255]) * (1 + length % 64), os.urandom(length)
        table.put(key, value, LONG_S)
        assert other.get(key) == value
        assert table.remove(key, 0)
    assert table.items() == []


def test_keys_with_zero_bytes_are_told_apart(table):
    keys = [b"a", b"a\0", b"a\0\0", b"\0a", b"a" * 64]
    for key in keys:
        table.put(key, b"value of " + key[:8], LONG_S)
    assert dict(table.items()) == {key: b"value of " + key[:8] for key in keys}


def test_keys_of_the_same_hash_are_told_apart(table):
    """Of each pair the lower 32 bits of the hash, which are a slot's tag, are equal."""
    for first, second in ((b"00281816", b"00358018"), (b"00058752", b"00341385")):
        table.put(first, b"1", LONG_S)
        assert table.get(second) is None
        table.put(second, b"2", LONG_S)
        assert (table.get(first), table.get(second)) == (b"1", b"2")
        assert table.remove(second, 0)
        assert table.get(first) == b"1"


def test_an_entry_vanishes_when_its_lease_ends(table):
    table.put(b"key", b"value", 0.03)
    assert table.get(b"key") == b"value"
    wait_until_gone(table, b"key")
    assert table.items() == []
    assert not table.remove(b"key", 0)
    table.put(b"key", b"new", LONG_S)
    assert table.items() == [(b"key", b"new")]


def test_an_entry_with_a_higher_fence_is_not_overwritten(table):
    table.put(b"key", b"second", LONG_S, fence=2)
    with pytest.raises(StaleIncarnation, match="fence 1 meets fence 2"):
        table.put(b"key", b"first", LONG_S, fence=1)
    table.put(b"key", b"second again", LONG_S, fence=2)
    table.put(b"key", b"third", LONG_S, fence=3)
    assert table.get(b"key") == b"third"


def test_an_expired_fence_counts_no_more(table):
    table.put(b"key", b"second", 0.0, fence=2)
    table.put(b"key", b"first", LONG_S, fence=1)
    assert table.get(b"key") == b"first"


def test_renew_needs_a_live_entry_of_the_same_fence(table):
    with pytest.raises(StaleIncarnation, match="has ended"):
        table.renew(b"key", b"value", LONG_S, fence=1)
    table.put(b"key", b"value", LONG_S, fence=2)
    for fence in (1, 3):
        with pytest.raises(StaleIncarnation):
            table.renew(b"key", b"other", LONG_S, fence=fence)
    table.renew(b"key", b"renewed", LONG_S, fence=2)
    assert table.get(b"key") == b"renewed"
    table.put(b"key", b"short", 0.0, fence=2)
    with pytest.raises(StaleIncarnation, match="has ended"):
        table.renew(b"key", b"late", LONG_S, fence=2)


def test_renew_prolongs_the_lease(table):
    table.put(b"key", b"value", 0.2)
    table.renew(b"key", b"value", LONG_S, fence=0)
    end = time.monotonic() + 0.25
    while time.monotonic() < end:
        assert table.get(b"key") == b"value"


def test_remove_needs_the_same_fence(table):
    table.put(b"key", b"value", LONG_S, fence=2**64 - 1)
    assert not table.remove(b"key", 2)
    assert table.get(b"key") == b"value"
    assert table.remove(b"key", 2**64 - 1)
    assert table.get(b"key") is None


def test_a_full_table_is_an_error_until_a_slot_is_free(table):
    for number in range(64):
        table.put(b"key %d" % number, b"", LONG_S)
    with pytest.raises(TableFull, match="no free slot"):
        table.put(b"one more", b"", LONG_S)
    table.put(b"key 7", b"replaced", LONG_S)
    assert table.remove(b"key 5", 0)
    table.put(b"one more", b"", LONG_S)
    assert len(table.items()) == 64


def test_eviction_takes_the_entry_that_expires_first(table):
    for number in range(64):
        table.put(b"key %d" % number, b"", LONG_S + (number * 37) % 64)
    table.put_evicting(b"new", b"value", LONG_S * 2)
    assert table.get(b"key 0") is None
    assert table.get(b"new") == b"value"
    assert len(table.items()) == 64


def test_eviction_without_end_keeps_the_newest(region_path):
    table = _native.Table.create(region_path, 256, 16)
    assert table.slots == 256
    for number in range(20_000):
        table.put_evicting(b"request %d" % number, b"%d" % number, LONG_S)
        assert table.get(b"request %d" % number) == b"%d" % number
    assert len(table.items()) == 256


def test_what_does_not_fit_is_refused(table):
    with pytest.raises(RecordTooLarge, match="up to 256"):
        table.put(b"key", b"x" * 257, LONG_S)
    for key in (b"", b"x" * 65):
        with pytest.raises(RecordTooLarge, match="1 to 64 bytes"):
            table.put(key, b"", LONG_S)
    with pytest.raises(ValueError, match="nan"):
        table.put(b"key", b"", float("nan"))


def test_a_closed_table_says_so(table):
    table.close()
    table.close()
    with pytest.raises(RegionError, match="has been closed"):
        table.get(b"key")


def test_processes_that_open_at_once_share_one_table(region_path):
    pids = []
    for number in range(8):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                opened = _native.Table.open_or_create(region_path, 64, 16)
                opened.put(b"child %d" % number, b"", LONG_S)
                status = 0
            finally:
                os._exit(status)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 8
    found = _native.Table.attach(region_path).items()
    assert sorted(found) == [(b"child %d" % number, b"") for number in range(8)]

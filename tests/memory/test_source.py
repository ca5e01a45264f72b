"""Models of the node's cache in one process: what stays mapped between two uses, and what goes."""

import logging
import threading
import time
from contextlib import ExitStack

import pytest

from aegaeon._native import WeightCache
from aegaeon.memory import spare
from aegaeon.memory.area import Locks
from aegaeon.memory.host_model import Reading
from aegaeon.memory.source import WeightSource
from aegaeon.memory.traffic import Traffic
from aegaeon.models.references import resolve
from tests.support.checkpoints import make_checkpoint
from tests.support.polling import eventually
from tests.support.regions import own_regions


class Pins:
    """Locks nothing, and knows what was asked for."""

    def __init__(self):
        self.locked = {}
        self.is_refusing = self.is_slow = False
        self.is_pinning = threading.Event()

    def pin(self, address, size_bytes, is_read_only, is_wanted):
        assert is_read_only, "the cache has its models mapped so"
        if self.is_refusing:
            return "it is full"
        self.is_pinning.set()
        while self.is_slow and is_wanted():
            time.sleep(0.001)
        if not is_wanted():
            return "it is not wanted any more"
        assert address not in self.locked
        self.locked[address] = size_bytes
        return ""

    def unpin(self, address):
        del self.locked[address]


@pytest.fixture
def open_source(tmp_path):
    """Makes sources of one model over a cache for two."""
    spec = resolve(str(make_checkpoint(tmp_path / "a", "llama")), str(tmp_path))
    with own_regions() as regions, ExitStack() as opened:

        def open_one(pins=None):
            cache = WeightCache.open_or_create(regions.weights, 2 * spec.weight_bytes)
            source = WeightSource(cache, (spec,), Reading(2, Traffic(), pins and Locks(pins)))
            opened.callback(source.close)
            return source

        yield open_one


@pytest.fixture
def source(open_source):
    return open_source()


def opened_whole(source):
    host = source.open("a")
    host.await_stage(host.plan.stages - 1)
    return host


def test_a_model_that_was_taken_back_is_opened_without_mapping_it_again(source):
    host = opened_whole(source)
    source.take_back(host)
    assert source.open("a") is host


def test_a_model_that_was_taken_back_can_be_evicted_and_is_then_read_again(source):
    host = opened_whole(source)
    source.take_back(host)
    # The last stage is in a little before the load has ended.
    eventually(lambda: source._cache.evict(source._plans["a"].key))
    read = source._cache.bytes_read
    again = opened_whole(source)
    assert again is not host
    eventually(lambda: source._cache.bytes_read == 2 * read)
    again.close()


def test_a_model_that_is_not_whole_is_not_kept(source):
    host = source.open("a")
    host.interrupt()
    host._is_whole = False
    source.take_back(host)
    assert source._mapped == {}


def test_of_two_taken_back_one_is_kept(source):
    one, other = opened_whole(source), opened_whole(source)
    source.take_back(one)
    source.take_back(other)
    assert source.open("a") is other
    with pytest.raises(Exception, match="closed"):
        one.memory.pin()
    other.close()


def test_a_whole_model_is_locked_once_for_as_long_as_it_is_mapped(open_source):
    pins = Pins()
    source = open_source(pins)
    host = opened_whole(source)
    eventually(lambda: pins.locked)
    assert pins.locked == {host.memory.address: host.plan.total_bytes}
    source.take_back(host)
    assert source.open("a") is host and len(pins.locked) == 1
    source.take_back(host)
    source.close()
    assert pins.locked == {}


def test_what_others_evict_is_soon_not_locked_any_more(open_source, monkeypatch):
    monkeypatch.setattr(spare, "LOOK_S", 0.01)
    monkeypatch.setattr(spare, "FULL_S", 0.01)
    pins = Pins()
    source = open_source(pins)
    host = opened_whole(source)
    eventually(lambda: pins.locked)
    source.take_back(host)
    other = open_source()
    eventually(lambda: other._cache.evict(source._plans["a"].key))
    eventually(lambda: pins.locked == {})
    assert source.open("a") is not host


def test_a_system_that_locks_nothing_costs_only_speed_and_is_told_once(open_source, caplog):
    pins = Pins()
    pins.is_refusing = True
    source = open_source(pins)
    for _ in range(2):
        host = opened_whole(source)
        host._arrival.join()
        host.close()
    assert pins.locked == {}
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "cannot be locked in memory: it is full" in warning.getMessage()


def test_what_is_locked_is_told_with_its_size_and_time(open_source, caplog):
    caplog.set_level(logging.INFO)
    pins = Pins()
    host = opened_whole(open_source(pins))
    eventually(lambda: pins.locked)
    host.close()
    [told] = [one.getMessage() for one in caplog.records if one.getMessage().startswith("locked")]
    assert "what=the weights of a gb=0.0" in told and "took_s=" in told


def test_closing_ends_a_lock_that_takes_long(open_source):
    pins = Pins()
    pins.is_slow = True
    host = opened_whole(open_source(pins))
    assert pins.is_pinning.wait(10.0)
    host.close()
    assert pins.locked == {}

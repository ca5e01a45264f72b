"""The thread that has memory ready for the next model."""

import logging
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from aegaeon._native import WeightCache
from aegaeon.errors import RegionError
from aegaeon.memory import spare
from aegaeon.memory.spare import SpareKeeper
from tests.support.polling import eventually
from tests.support.regions import own_regions

# Leaves without closing anything, while the thread goes in and out of native code.
LEAVER = """
import sys, time
from types import SimpleNamespace
from aegaeon._native import WeightCache
from aegaeon.memory import spare
spare.LOOK_S = 0.0
cache = WeightCache.open_or_create(sys.argv[1], 4 << 20)
keeper = spare.SpareKeeper(cache, [SimpleNamespace(id="a", weight_bytes=2 << 20)])
time.sleep(0.02)
"""

SPECS = tuple(
    SimpleNamespace(id=name, weight_bytes=size) for name, size in (("a", 10), ("b", 30), ("c", 20))
)


class Cache:
    """Says what it holds, and keeps what it was asked for."""

    def __init__(self, *held, has_room=True, failure=None):
        self.held = held
        self.has_room = has_room
        self.failure = failure
        self.prepared = []
        self.looks = threading.Semaphore(0)

    def status(self):
        self.looks.release()
        return [SimpleNamespace(model=model) for model in self.held]

    def prepare(self, size_bytes):
        self.prepared.append(size_bytes)
        if self.failure is not None:
            raise self.failure
        return self.has_room


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr(spare, "LOOK_S", 0.001)


@pytest.fixture
def keep():
    keepers = []

    def keep(cache, specs=SPECS):
        keepers.append(SpareKeeper(cache, specs))
        return keepers[-1]

    yield keep
    for keeper in keepers:
        keeper.stop()
        keeper.join()
        assert not keeper._thread.is_alive()


@pytest.mark.parametrize(("held", "wanted"), [((), 30), (("b",), 20), (("c", "b", "x"), 10)])
def test_it_prepares_for_the_largest_model_that_is_not_there(keep, held, wanted):
    cache = Cache(*held)
    keep(cache)
    eventually(lambda: len(cache.prepared) > 3)
    assert set(cache.prepared) == {wanted}


def test_it_prepares_nothing_where_all_are_there(keep):
    cache = Cache("a", "b", "c")
    keep(cache)
    for _ in range(3):
        assert cache.looks.acquire(timeout=5.0)
    assert cache.prepared == []


def test_it_looks_no_more_when_it_was_stopped(keep):
    cache = Cache()
    keeper = keep(cache)
    eventually(lambda: cache.prepared)
    keeper.stop()
    keeper.join()
    looked = len(cache.prepared)
    assert not keeper._thread.is_alive()
    assert len(cache.prepared) == looked


def test_it_leaves_memory_that_is_short_alone_for_a_while(keep):
    cache = Cache(has_room=False)
    keeper = keep(cache)
    eventually(lambda: cache.prepared)
    keeper._thread.join(0.05)
    assert keeper._thread.is_alive()
    assert len(cache.prepared) == 1


def test_it_ends_with_one_warning(keep, caplog):
    cache = Cache(failure=RegionError("cannot make it"))
    keeper = keep(cache)
    keeper._thread.join(5.0)
    assert len(cache.prepared) == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "cannot make it" in record.getMessage()


def test_a_cache_that_closes_under_it_is_no_reason_to_warn(keep, caplog):
    with own_regions() as regions:
        cache = WeightCache.open_or_create(regions.weights, 1 << 30)
        keeper = keep(cache, (SimpleNamespace(id="a", weight_bytes=1 << 30),))
        eventually(lambda: cache.ready_bytes > 0)
        keeper.stop()
        cache.close()
        keeper.join()
        assert not keeper._thread.is_alive()
        assert 0 < Path(f"{regions.weights}+spare").stat().st_blocks * 512 < 1 << 30
    assert caplog.records == []


def test_a_process_may_end_without_closing_it():
    with own_regions() as regions:
        for _ in range(4):
            command = [sys.executable, "-c", LEAVER, regions.weights]
            left = subprocess.run(command, capture_output=True, timeout=60, check=False)
            assert left.returncode == 0, left.stderr


# Gathering


class Loaded:
    """A model of five huge pages and a part of one, which comes in after some looks."""

    def __init__(self, looks=0, is_loader=True, refuses=False):
        self.size_bytes = 5 * spare.HUGE_PAGE_BYTES + 4096
        self.stages = 3
        self.is_loader = is_loader
        self.gathered = []
        self._looks = looks
        self._refuses = refuses

    @property
    def stages_done(self):
        self._looks -= 1
        return self.stages if self._looks < 0 else 1

    def gather(self, offset):
        self.gathered.append(offset // spare.HUGE_PAGE_BYTES)
        return not self._refuses


@pytest.mark.parametrize("looks", [0, 3])
def test_whole_huge_pages_of_a_model_are_gathered_once_it_is_in(looks):
    loaded, keeper = Loaded(looks), SpareKeeper(Cache("b"), SPECS)
    keeper.gather(loaded)
    eventually(lambda: loaded.gathered == [0, 1, 2, 3, 4])
    keeper.stop()
    keeper.join()
    assert loaded.gathered == [0, 1, 2, 3, 4]


def test_a_model_whose_load_was_given_up_is_forgotten():
    cache, lost, loaded = Cache("b"), Loaded(looks=10**9, is_loader=False), Loaded()
    keeper = SpareKeeper(cache, SPECS)
    keeper.gather(lost)
    keeper.gather(loaded)
    eventually(lambda: len(loaded.gathered) == 5)
    assert not keeper._loading and not lost.gathered
    keeper.stop()
    keeper.join()


def test_a_system_that_gives_no_huge_pages_is_not_asked_for_ever(monkeypatch):
    monkeypatch.setattr(spare, "MOST_REFUSALS", 2)
    loaded, keeper = Loaded(refuses=True), SpareKeeper(Cache("b"), SPECS)
    keeper.gather(loaded)
    eventually(lambda: len(loaded.gathered) == 2)
    keeper.stop()
    keeper.join()
    assert loaded.gathered == [0, 1]

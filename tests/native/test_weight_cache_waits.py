"""The weight cache where others are in the way: files that change, processes that stand still."""

import os
import threading

import pytest

from aegaeon._native import WeightCache
from aegaeon.errors import CheckpointError, LoadCancelled
from aegaeon.models.checkpoint import plan_load
from aegaeon.models.packing import plan_pack
from tests.support.checkpoints import make_checkpoint
from tests.support.regions import own_regions
from tests.support.stopped import HEADER_BYTES, lock_held

BUDGET = 1 << 24
PAGE = 4096
RECORD_BYTES = 496  # of an eviction; it begins with its number


def key_of(number):
    return number.to_bytes(32, "big")


@pytest.fixture
def path():
    with own_regions() as regions:
        yield regions.weights


@pytest.fixture
def cache(path):
    return WeightCache.open_or_create(path, BUDGET)


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(PAGE))
    return file


def job_of(file, stage=0, size=64):
    status = file.stat()
    planned = (str(file), status.st_size, status.st_mtime_ns, status.st_ino)
    return (planned, 0, size, 1, size, 4, 0, 0, stage, 0)


def load_one(cache, number, file, stages=1):
    model = cache.acquire(key_of(number), f"model {number}", PAGE, stages, 1.0)
    model.load([job_of(file, stages - 1)], 1)
    return model


def test_a_file_that_was_replaced_since_it_was_planned_is_not_read(cache, tmp_path):
    old, new = (make_checkpoint(tmp_path / name, "llama", seed=ord(name)) for name in "ab")
    plan = plan_pack(plan_load(old))
    model = cache.acquire(plan.digest(), "a", plan.total_bytes, plan.stages, 1.0)
    (new / "model.safetensors").replace(old / "model.safetensors")
    with pytest.raises(CheckpointError, match="changed since it was planned"):
        model.load(plan.jobs(), 1)
    assert cache.bytes_read == 0


def test_a_file_that_was_touched_since_it_was_planned_is_not_taken_over(cache, source):
    model = cache.acquire(key_of(1), "a", PAGE, 1, 1.0)
    job = job_of(source)
    model.close()
    heir = cache.acquire(key_of(1), "a", PAGE, 1, 1.0)
    os.utime(source, ns=(1, 1))
    assert heir.is_loader
    with pytest.raises(CheckpointError, match="changed since it was planned"):
        heir.load([job], 1)


def test_jobs_that_make_no_sense_are_an_answer_to_all_who_wait(path, cache, source):
    waiting = WeightCache.open_or_create(path, BUDGET)
    model = cache.acquire(key_of(1), "a", PAGE, 1, 1.0)
    other = waiting.acquire(key_of(1), "a", PAGE, 1, 1.0)
    with pytest.raises(CheckpointError, match="a stage that the model does not have"):
        model.load([job_of(source, stage=7)], 1)
    with pytest.raises(CheckpointError, match="a stage that the model does not have"):
        other.wait_stage(1, 1.0)
    assert not other.take_over()


def test_a_load_that_was_cancelled_before_it_began_does_not_run(cache, source):
    model = cache.acquire(key_of(1), "a", PAGE, 1, 1.0)
    model.cancel()
    with pytest.raises(LoadCancelled):
        model.load([job_of(source)], 1)


def test_an_evicted_model_has_no_stages_though_its_successor_has_many(path, source):
    cache = WeightCache.open_or_create(path, PAGE)
    old = load_one(cache, 1, source)
    for number in range(2, 131):  # the 128 places are taken by turns
        load_one(cache, number, source, stages=5)
    assert old.stages_done == 0


def test_a_stopped_holder_of_the_lock_stops_no_loop(path, cache, source):
    load_one(cache, 1, source)
    with lock_held(path):
        assert cache.used_bytes == PAGE
        for is_wanted in (True, False, True):
            cache.set_demand(key_of(1), is_wanted)
        cache.set_demand(key_of(2), True)
    assert [entry.demand_pids for entry in cache.status()] == [[os.getpid()]]
    load_one(cache, 2, source)
    assert [entry.demand_pids for entry in cache.status()] == [[os.getpid()]] * 2
    with lock_held(path):
        cache.close()
    assert [entry.demand_pids for entry in WeightCache.open_or_create(path, BUDGET).status()] == [
        [], []
    ]  # fmt: skip


def test_other_threads_run_while_a_cache_waits_for_its_lock(path, cache):
    opened = []
    with lock_held(path) as words:
        thread = threading.Thread(
            target=lambda: opened.append(WeightCache.open_or_create(path, BUDGET))
        )
        thread.start()
        words[HEADER_BYTES] = 0
        thread.join()
    assert len(opened) == 1


def test_one_killed_while_it_records_an_eviction_damages_nothing(path):
    cache = WeightCache.open_or_create(path, PAGE)
    for number in range(135):
        cache.acquire(key_of(number), f"model {number}", PAGE, 1, 1.0).close()
    before = cache.evictions()
    count = before[-1].number + 1
    oldest = count - 128
    with lock_held(path) as words:
        follows = words.find(oldest + 1)
        record = next(at for at in words.find(oldest) if at + RECORD_BYTES in follows)
        words[record] = count
    after = cache.evictions()
    assert [eviction.number for eviction in after] == list(range(oldest + 1, count))
    assert WeightCache.open_or_create(path, PAGE).evictions()

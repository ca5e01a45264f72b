"""One or a few clients of the weight cache in one process: pins, evictions, refusals."""

import contextlib
import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from aegaeon import _native
from aegaeon.errors import (
    BudgetTooSmall,
    CheckpointError,
    LoadCancelled,
    RegionError,
    RegionMismatch,
    WeightsEvicted,
)
from aegaeon.memory.evictions import EvictionLog
from tests.support.bring_in import CacheRequest, bring_in
from tests.support.weight_files import key, plain

PAGE = 4096
STAGE = 16 * PAGE
MODEL = 4 * STAGE


@pytest.fixture
def caches(region_path):
    budgets = []

    def open_cache(budget_bytes=3 * MODEL):
        budgets.append(budget_bytes)
        return _native.WeightCache.open_or_create(region_path, budget_bytes)

    yield open_cache
    gc.collect()
    if budgets:
        cache = _native.WeightCache.open_or_create(region_path, budgets[0])
        assert all(
            cache.evict(key(number)) for number in range(200) if f"model {number}" in names(cache)
        )
        assert resident_bytes(region_path) == 0


@pytest.fixture
def cache(caches):
    return caches()


@pytest.fixture
def plan(tmp_path):
    return plain(tmp_path / "file", stages=4, stage_bytes=STAGE)


def load(cache, plan, number):
    model = plan.acquire(cache, number)
    if model.is_loader:
        model.load(plan.jobs, 1)
    return model


def names(cache):
    return {entry.model for entry in cache.status()}


def resident_bytes(region_path):
    files = Path(region_path).parent.glob(f"{Path(region_path).name}+*")
    return sum(file.stat().st_blocks * 512 for file in files)


def test_a_second_acquire_finds_what_the_first_has_loaded(caches, plan):
    first, second = caches(), caches()
    model = load(first, plan, 0)
    other = plan.acquire(second, 0)
    assert not model.is_loader
    assert not other.is_loader
    assert other.stages_done == plan.stages
    assert other.wait_stage(plan.stages, 0.0)
    plan.check(other)
    assert first.bytes_read == MODEL


def test_the_memory_lives_as_long_as_a_buffer_of_it(cache, plan):
    model = load(cache, plan, 0)
    assert model.address % PAGE == 0
    memory = np.frombuffer(model, np.uint8)
    assert memory.ctypes.data == model.address
    assert not memoryview(model).readonly
    model.close()
    del model
    gc.collect()
    assert memory.sum() > 0


def test_a_pinned_model_is_never_evicted(cache, plan):
    models = [load(cache, plan, number) for number in range(3)]
    assert all(model.pin() for model in models)
    assert not cache.evict(key(0))
    with pytest.raises(BudgetTooSmall, match=rf"model 0 is pinned by pids {os.getpid()}.*; wait"):
        plan.acquire(cache, 3, timeout_s=0.0)
    models[1].unpin()
    load(cache, plan, 3)
    assert names(cache) == {"model 0", "model 2", "model 3"}
    assert not models[1].pin()
    assert models[1].stages_done == 0
    with pytest.raises(WeightsEvicted, match="model 1 has been evicted"):
        models[1].wait_stage(1, 1.0)


def test_pins_count_and_an_unpin_too_many_is_an_error(cache, plan):
    model, same = load(cache, plan, 0), load(cache, plan, 0)
    assert model.pin()
    assert model.pin()
    assert same.pin()
    model.unpin()
    model.unpin()
    with pytest.raises(RuntimeError, match="not pinned"):
        model.unpin()
    assert not cache.evict(key(0))
    same.close()
    assert cache.evict(key(0))


def test_closing_a_model_drops_its_pins_only(cache, plan):
    model, same = load(cache, plan, 0), load(cache, plan, 0)
    assert model.pin()
    assert same.pin()
    model.close()
    model.close()
    assert cache.status()[0].pin_pids == [os.getpid()]
    same.close()
    assert cache.status()[0].pin_pids == []
    with pytest.raises(RegionError, match="closed"):
        model.pin()


def test_a_model_larger_than_the_cache_is_refused_at_once(cache, plan):
    with pytest.raises(BudgetTooSmall, match=f"cache holds {3 * MODEL}; raise --model-cache"):
        cache.acquire(key(0), "huge", 3 * MODEL + 1, 1, 100.0)


def test_who_waits_for_room_gets_it_when_a_pin_goes(cache, plan):
    models = [load(cache, plan, number) for number in range(3)]
    for model in models:
        assert model.pin()
    timer = threading.Timer(0.05, models[2].unpin)
    timer.start()
    assert plan.acquire(cache, 3, timeout_s=30.0).is_loader
    timer.join()
    assert names(cache) == {"model 0", "model 1", "model 3"}


def test_the_model_that_is_used_least_goes_first(cache, plan):
    models = [load(cache, plan, number) for number in range(3)]
    use(models[0], 500)
    use(models[2], 500)
    load(cache, plan, 3)
    assert names(cache) == {"model 0", "model 2", "model 3"}


def test_demand_of_a_live_client_makes_a_model_dearer(caches, plan):
    # So many that they outweigh what the measured times of three small loads differ by.
    first, others = caches(), [caches() for _ in range(30)]
    for number in range(3):
        load(first, plan, number)
    for other in others:
        other.set_demand(key(0), True)
    others[0].set_demand(key(3), True)
    load(first, plan, 3)
    assert "model 0" in names(first)
    demand = {entry.model: entry.demand_pids for entry in first.status()}
    assert set(demand["model 0"]) == {os.getpid()}
    for other in others:
        other.close()
    assert all(entry.demand_pids == [] for entry in first.status())


def use(model, times):
    for _ in range(times):
        model.note_use()


def test_a_small_victim_that_a_later_larger_one_makes_needless_stays(caches, tmp_path):
    cache = caches(3 * MODEL + PAGE)
    small = plain(tmp_path / "small", stages=1, stage_bytes=PAGE)
    large = plain(tmp_path / "large", stages=4, stage_bytes=STAGE)
    load(cache, small, 0)
    for number, times in ((1, 40_000), (2, 40_000), (3, 400)):
        use(load(cache, large, number), times)
    load(cache, large, 4)
    assert "model 0" in names(cache)
    assert "model 3" not in names(cache)


def test_what_was_just_loaded_for_another_is_safe_for_a_while(caches, tmp_path):
    plan = plain(tmp_path / "file", stages=2, stage_bytes=24 << 20)
    first, second = caches(plan.size_bytes), caches(plan.size_bytes)
    first.set_demand(key(0), True)
    load(first, plan, 0)
    with pytest.raises(BudgetTooSmall, match="model 0 is kept for others"):
        plan.acquire(second, 1, timeout_s=0.0)
    assert plan.acquire(second, 1, timeout_s=30.0).is_loader
    assert names(first) == {"model 1"}


def test_every_eviction_is_recorded_with_its_reason(cache, plan, caplog):
    log = EvictionLog(cache)
    for number in range(5):
        use(load(cache, plan, number), 0 if number < 2 else 500)
    assert cache.evict(key(4))
    evictions = cache.evictions()
    # Of the two that are worth little, the one that was quicker to load goes first.
    assert {one.model for one in evictions[:2]} == {"model 0", "model 1"}
    assert evictions[2].model == "model 4"
    assert [one.number for one in evictions] == [0, 1, 2]
    assert evictions[0].reason.startswith("room for model 3: saves ")
    assert evictions[2].reason.startswith("asked for: saves ")
    assert {one.pid for one in evictions} == {os.getpid()}
    assert {one.size_bytes for one in evictions} == {MODEL}
    caplog.set_level("INFO")
    log.write()
    log.write()
    assert [r.message.split()[2] for r in caplog.records] == ["model=model"] * 3
    assert evictions[0].reason in caplog.records[0].message


def test_evictions_of_this_process_are_counted_and_what_is_held_is_seen_when_looked_for(
    cache, plan, monkeypatch
):
    monkeypatch.setattr("aegaeon.memory.evictions.LOOK_S", 0.0)
    log = EvictionLog(cache)
    for number in range(5):
        use(load(cache, plan, number), 0 if number < 2 else 500)
    assert log.held == ()
    log.look()
    assert log.held == tuple(sorted(names(cache)))
    assert cache.evict(key(4))
    log.write()
    log.write()
    assert log.counts == {
        "model 0": {"room": 1},
        "model 1": {"room": 1},
        "model 4": {"asked_for": 1},
    }
    monkeypatch.setattr("aegaeon.memory.evictions.os.getpid", lambda: -1)
    assert cache.evict(key(3))
    log.write()
    assert "model 3" not in log.counts  # another process's, which counts it


def test_only_the_last_127_evictions_are_kept(cache, tmp_path):
    plan = plain(tmp_path / "file", stages=1, stage_bytes=64)
    for number in range(150):
        load(cache, plan, number % 2)
        assert cache.evict(key(number % 2))
    assert [one.number for one in cache.evictions()] == list(range(23, 150))


def test_more_models_than_entries_evict_each_other(cache, tmp_path):
    plan = plain(tmp_path / "file", stages=1, stage_bytes=64)
    for number in range(140):
        load(cache, plan, number)
    assert len(cache.status()) == 128
    assert "model 139" in names(cache)


def test_evicted_memory_is_free_at_once_though_it_is_mapped(cache, plan, region_path):
    model = load(cache, plan, 0)
    assert resident_bytes(region_path) == cache.used_bytes == MODEL
    assert cache.evict(key(0))
    assert resident_bytes(region_path) == cache.used_bytes == 0
    assert not model.pin()


def test_an_odd_size_counts_in_whole_pages(cache, tmp_path, region_path):
    plan = plain(tmp_path / "file", stages=3, stage_bytes=5000)
    load(cache, plan, 0)
    assert cache.used_bytes == resident_bytes(region_path) == 4 * PAGE


def test_a_failed_model_stays_for_those_who_read_it_still(cache, plan, region_path):
    model, reader = plan.acquire(cache, 0), plan.acquire(cache, 0)
    model.load(plan.jobs[:1], 1)
    assert reader.pin()
    other, waiter = plan.acquire(cache, 1), plan.acquire(cache, 1)
    assert waiter.pin()
    plan.path.unlink()
    with pytest.raises(CheckpointError):
        other.load(plan.jobs, 1)
    assert cache.used_bytes == 2 * MODEL
    assert plan.acquire(cache, 1).is_loader
    waiter.unpin()
    assert {entry.state for entry in cache.status()} == {"ready", "loading"}


def test_another_budget_is_refused(caches, region_path):
    caches()
    with pytest.raises(RegionMismatch, match=f"up to {3 * MODEL} bytes, this process wants 5"):
        _native.WeightCache.open_or_create(region_path, 5)


def test_a_removed_data_file_means_loading_again(cache, plan, region_path):
    load(cache, plan, 0)
    for file in Path(region_path).parent.glob(f"{Path(region_path).name}+*"):
        file.unlink()
    again = plan.acquire(cache, 0)
    assert again.is_loader
    again.load(plan.jobs, 1)
    plan.check(again)


def test_a_half_load_whose_file_was_removed_begins_again(cache, tmp_path, region_path):
    plan = plain(tmp_path / "large", stages=48, stage_bytes=MODEL // 16)
    model, waiter = plan.acquire(cache, 0), plan.acquire(cache, 0)

    def run():
        with contextlib.suppress(LoadCancelled):
            model.load(plan.jobs, 1)

    thread = threading.Thread(target=run)
    thread.start()
    assert waiter.wait_stage(1, 10.0)
    model.cancel()
    thread.join()
    for file in Path(region_path).parent.glob(f"{Path(region_path).name}+*"):
        file.unlink()
    again = plan.acquire(cache, 0)
    assert again.is_loader
    assert again.stages_done == 0
    again.load(plan.jobs, 1)
    plan.check(again)


def test_a_closed_cache_says_so(cache, plan):
    cache.close()
    cache.close()
    with pytest.raises(RegionError, match="has been closed"):
        plan.acquire(cache, 0)


def test_a_fork_must_open_the_cache_itself(cache, plan):
    model = load(cache, plan, 0)
    child = os.fork()
    if child == 0:
        refused = 0
        for use in (model.pin, lambda: plan.acquire(cache, 0)):
            try:
                use()
            except RegionError:
                refused += 1
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2


def test_keys_and_sizes_are_checked(cache, plan):
    for bad in (b"short", b"k" * 33):
        with pytest.raises(ValueError, match="32 bytes"):
            cache.acquire(bad, "m", 64, 1, 0.0)
    for size, stages, name in ((0, 1, "m"), (64, 0, "m"), (64, 1 << 17, "m"), (64, 1, "")):
        with pytest.raises(ValueError, match="a cached model has"):
            cache.acquire(key(0), name, size, stages, 0.0)
    load(cache, plan, 0)
    with pytest.raises(RegionMismatch, match="of another size"):
        cache.acquire(key(0), "m", 64, 1, 0.0)


def test_bring_in_loads_waits_and_pins(caches, plan):
    request = CacheRequest(key(0), "model 0", plan.size_bytes, plan.stages)
    first, second = caches(), caches()
    models = []

    def bring(cache):
        models.append(bring_in(cache, request, lambda: plan.jobs, 1, 30.0))

    threads = [threading.Thread(target=bring, args=(cache,)) for cache in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert first.bytes_read == plan.size_bytes
    for model in models:
        plan.check(model)
        model.unpin()

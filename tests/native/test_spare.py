"""Memory made ready ahead of a load: what lies in it afterwards, and how much there ever is."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from aegaeon import _native
from aegaeon.errors import CheckpointError, RegionError
from tests.support.polling import eventually
from tests.support.small_memory import run_in_small_memory
from tests.support.weight_files import FROM_BF16, FROM_F16, NO_CONVERSION, ROWS, TILES, Plan, key

MIB = 1 << 20
HUGE = 2 * MIB
BUDGET = 128 * MIB


def pages(size_bytes: int) -> int:
    return -(-size_bytes // 4096) * 4096


def resident_bytes(path: str) -> int:
    files = Path(path).parent.glob(f"{Path(path).name}+*")
    return sum(file.stat().st_blocks * 512 for file in files)


def open_cache(path: str, budget: int = BUDGET) -> _native.WeightCache:
    return _native.WeightCache.open_or_create(path, budget)


def mixed(path: Path, seed: int = 0, tail: int = 333_333) -> Plan:
    """Return a written plan of about 6 MiB, of each kind of tensor, none of a round size."""
    rng = np.random.default_rng(seed)
    plan = Plan(path, before=7)
    plan.add(rng.integers(0, 1 << 16, (1031, 517), np.uint16), TILES)
    plan.add(rng.integers(0, 256, (1, 1_500_001), np.uint8), ROWS)
    plan.add(rng.integers(0, 1 << 15, (701, 641), np.uint16), TILES, FROM_BF16)
    plan.add(rng.integers(0, 1 << 32, (130, 1111), np.uint32), TILES, NO_CONVERSION)
    plan.add(rng.integers(0, 0x7C00, (1, tail), np.uint16), ROWS, FROM_F16)
    return plan.write()


def bring_in(plan: Plan, cache: _native.WeightCache, number: int = 0) -> _native.CachedModel:
    model = plan.acquire(cache, number)
    assert model.is_loader
    model.load(plan.jobs, 2)
    plan.check(model)
    return model


@pytest.fixture
def plan(tmp_path):
    return mixed(tmp_path / "file")


@pytest.fixture
def cache(region_path):
    """A cache that leaves nothing behind."""
    cache = open_cache(region_path)
    yield cache
    Path(f"{region_path}+spare").unlink(missing_ok=True)


@pytest.mark.parametrize("spare", [HUGE, 2 * HUGE, 8 * MIB, 12 * MIB])
def test_a_model_takes_what_was_made_ready_and_gives_back_what_it_does_not_need(
    cache, region_path, plan, spare
):
    assert cache.prepare(spare)
    assert resident_bytes(region_path) == cache.ready_bytes == cache.spare_bytes == spare
    bring_in(plan, cache).close()
    assert cache.spare_bytes == cache.ready_bytes == 0
    assert resident_bytes(region_path) == pages(plan.size_bytes)
    assert cache.evict(key(0))


def test_a_spare_far_larger_than_the_model_is_kept_while_both_fit(cache, region_path, plan):
    assert cache.prepare(64 * MIB)
    bring_in(plan, cache).close()
    assert cache.ready_bytes == cache.spare_bytes == 64 * MIB
    assert resident_bytes(region_path) == 64 * MIB + pages(plan.size_bytes)
    assert cache.evict(key(0))


def test_a_spare_that_does_not_fit_beside_the_model_is_taken(cache, region_path, plan):
    assert cache.prepare(BUDGET)
    assert cache.spare_bytes == resident_bytes(region_path) == BUDGET
    bring_in(plan, cache).close()
    assert resident_bytes(region_path) == pages(plan.size_bytes)
    assert cache.evict(key(0))


def test_the_memory_of_a_model_that_makes_room_is_the_next_ones(region_path, tmp_path):
    plans = [mixed(tmp_path / f"{n}", n, tail) for n, tail in enumerate((333_333, 99_999, 500_001))]
    cache = open_cache(region_path, max(pages(plan.size_bytes) for plan in plans))
    cache.prepare(plans[0].size_bytes)
    inodes = set()
    # Smaller, as large, larger: each over what another has left.
    for turn, number in enumerate((0, 1, 0, 2, 1, 2)):
        bring_in(plans[number], cache, number).close()
        (file,) = Path(region_path).parent.glob(f"{Path(region_path).name}+*")
        inodes.add(file.stat().st_ino)
        assert file.stat().st_blocks * 512 == pages(plans[number].size_bytes)
        assert len(cache.evictions()) == turn
    assert len(inodes) == 1
    assert cache.evict(key(2))
    assert resident_bytes(region_path) == cache.spare_bytes == 0


def test_models_and_spare_never_exceed_the_budget(region_path, tmp_path):
    plans = [mixed(tmp_path / f"{n}", n, 100_001 + 200_001 * n) for n in range(4)]
    budget = 17 * MIB + 4096
    cache, rng = open_cache(region_path, budget), random.Random(3)
    for _ in range(150):
        number = rng.randrange(4)
        match rng.randrange(4):
            case 0:
                cache.prepare(rng.randrange(1, 20 * MIB))
            case 1:
                cache.evict(key(number))
            case _:
                model = plans[number].acquire(cache, number)
                if model.is_loader:
                    model.load(plans[number].jobs, 2)
                plans[number].check(model)
                model.close()
        assert resident_bytes(region_path) <= cache.used_bytes + cache.spare_bytes <= budget
    for number in range(4):
        cache.evict(key(number))
    assert resident_bytes(region_path) <= cache.spare_bytes
    Path(f"{region_path}+spare").unlink(missing_ok=True)


def freeing(cache: _native.WeightCache, region_path: str, size_bytes: int) -> threading.Thread:
    """Return a thread that is at giving back so much, which takes it a while."""
    while True:
        cache.acquire(key(0), "big", size_bytes, 1, 0.0).close()
        (file,) = Path(region_path).parent.glob(f"{Path(region_path).name}+*")
        with file.open("rb+") as data:
            os.posix_fallocate(data.fileno(), 0, size_bytes)
        evicting = threading.Thread(target=cache.evict, args=(key(0),))
        evicting.start()
        while evicting.is_alive():
            if any(entry.state == "freeing" for entry in cache.status()):
                return evicting


def test_room_that_others_are_still_freeing_is_waited_for(region_path):
    big, small = 512 * MIB, 4 * MIB
    cache = open_cache(region_path, big + small)
    evicting = freeing(cache, region_path, big)
    cache.acquire(key(1), "small", small, 1, 0.0).close()
    # More than both: the small one goes as well, and its file is the new one's.
    model = cache.acquire(key(2), "new", big + HUGE, 1, 10.0)
    assert sum(entry.size_bytes for entry in cache.status()) <= cache.budget_bytes
    evicting.join()
    model.close()
    assert cache.evict(key(2))


def test_a_spare_that_somebody_removes_is_made_anew(cache, region_path, plan):
    spare = Path(f"{region_path}+spare")
    for number in range(2):
        cache.prepare(8 * MIB)
        spare.unlink()
        bring_in(plan, cache, number).close()
        assert cache.spare_bytes == 0
    cache.prepare(8 * MIB)
    spare.unlink()
    cache.prepare(8 * MIB)
    assert cache.ready_bytes == resident_bytes(region_path) - 2 * pages(plan.size_bytes) == 8 * MIB
    assert cache.evict(key(0))
    assert cache.evict(key(1))


def test_the_spare_of_a_cache_that_was_removed_does_not_stay(cache, region_path):
    cache.prepare(64 * MIB)
    _native.unlink(region_path)
    other = open_cache(region_path, HUGE - 4096)
    other.prepare(HUGE)
    assert resident_bytes(region_path) == other.spare_bytes == 0


def test_a_load_taken_over_after_its_file_was_removed_is_right(cache, region_path, plan):
    cache.prepare(8 * MIB)
    plan.acquire(cache).close()
    (file,) = Path(region_path).parent.glob(f"{Path(region_path).name}+0-*")
    file.unlink()
    bring_in(plan, cache).close()
    assert resident_bytes(region_path) == pages(plan.size_bytes)
    assert cache.evict(key(0))


def test_a_load_that_fails_gives_back_what_was_made_ready(cache, region_path, plan):
    cache.prepare(8 * MIB)
    jobs = plan.jobs
    os.truncate(plan.path, 3 * MIB)
    model = plan.acquire(cache)
    with pytest.raises(CheckpointError):
        model.load(jobs, 2)
    assert resident_bytes(region_path) == cache.used_bytes == cache.spare_bytes == 0


def test_signals_do_not_end_it(cache):
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    try:
        assert cache.prepare(BUDGET)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert cache.ready_bytes == BUDGET


def test_a_closed_cache_stops_and_refuses(region_path):
    cache = open_cache(region_path, 4096 * MIB)
    preparing = threading.Thread(target=cache.prepare, args=(4096 * MIB,))
    preparing.start()
    eventually(lambda: cache.ready_bytes > 0)
    cache.close()
    preparing.join(5.0)
    assert not preparing.is_alive()
    assert 0 < cache.ready_bytes < cache.spare_bytes
    with pytest.raises(RegionError, match="has been closed"):
        cache.prepare(HUGE)
    Path(f"{region_path}+spare").unlink()


def test_one_of_two_makes_it_ready(cache, region_path, plan):
    """And the other can load meanwhile, into what it takes from the first."""
    other = open_cache(region_path)
    ended = threading.Event()

    def prepare() -> None:
        while not ended.is_set():
            other.prepare(8 * MIB)

    preparing = threading.Thread(target=prepare)
    preparing.start()
    try:
        ends_s = time.monotonic() + 1.0
        while time.monotonic() < ends_s:
            cache.prepare(BUDGET)
            bring_in(plan, cache).close()
            # What the step that others are at may add.
            assert resident_bytes(region_path) <= BUDGET + HUGE
            assert cache.evict(key(0))
    finally:
        ended.set()
        preparing.join()
    assert cache.prepare(8 * MIB)
    assert cache.ready_bytes == cache.spare_bytes == resident_bytes(region_path) <= BUDGET


def test_a_fork_may_not_prepare(cache):
    pid = os.fork()
    if pid == 0:
        try:
            cache.prepare(HUGE)
        except RegionError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# In a file system of 32 MiB, of which 2 MiB are left to others.
CROWDED = """
import contextlib, os, sys
from pathlib import Path
from aegaeon import _native
from tests.native.test_spare import MIB, bring_in, mixed, pages
mount, files = map(Path, sys.argv[1:])
path = str(mount / "aegaeon-crowded.weights")
spare, filler = Path(f"{path}+spare"), mount / "filler"
cache = _native.WeightCache.open_or_create(path, 256 * MIB)

def free_bytes():
    space = os.statvfs(mount)
    return space.f_bavail * space.f_frsize

def fill(left):
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while free_bytes() > left:
            file.write(bytes(4096))

assert not cache.prepare(200 * MIB)
assert 2 * MIB <= free_bytes() <= 4 * MIB, free_bytes()
made = cache.ready_bytes
assert made >= 26 * MIB

# Others want some of what was left: the spare stays. They want more: it goes.
fill(3 * MIB // 2)
assert not cache.prepare(200 * MIB) and cache.ready_bytes == made
fill(MIB // 2)
assert not cache.prepare(200 * MIB)
assert not spare.exists() and cache.spare_bytes == cache.ready_bytes == 0
assert free_bytes() > made

# What is ready is there for a model, whatever happens meanwhile.
filler.unlink()
assert not cache.prepare(200 * MIB)
fill(0)
plan = mixed(files / "file")
bring_in(plan, cache).close()
assert Path(f"{path}+0-0").stat().st_blocks * 512 == pages(plan.size_bytes)
filler.unlink()
assert not cache.prepare(200 * MIB) and cache.ready_bytes > 0
"""


def test_memory_that_others_need_is_left_to_them(tmp_path):
    run_in_small_memory(tmp_path / "mounted", "32m", CROWDED, tmp_path)

"""Several processes on one weight cache: one load for all, and deaths at any moment."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from aegaeon import _native
from aegaeon.errors import RegionError
from tests.support.bad_disk import BadDisk
from tests.support.weight_files import key, plain

ROOT = Path(__file__).parents[2]
STAGE = 1 << 20
BUDGET = 256 << 20

READER = """
    import sys
    from pathlib import Path
    from aegaeon import _native
    from tests.support.bring_in import CacheRequest, bring_in
    from tests.support.weight_files import key, plain, planned
    path, file = sys.argv[1], Path(sys.argv[2])
    plan = plain(Path(sys.argv[3]), stages=16, stage_bytes=1 << 20)
    cache = _native.WeightCache.open_or_create(path, 256 << 20)
    request = CacheRequest(key(0), "model 0", plan.size_bytes, plan.stages)
    jobs = [(planned(file), *job[1:]) for job in plan.jobs]
    print("ready", flush=True)
    sys.stdin.readline()
    model = bring_in(cache, request, lambda: jobs, 1, 60.0)
    plan.check(model)
    print("checked", flush=True)
    sys.stdin.readline()
"""

# Loads the first stages, pins, and then waits to be killed as the loader.
HALF_LOADER = """
    import sys, threading
    from pathlib import Path
    from aegaeon import _native
    from tests.support.weight_files import key, plain
    plan = plain(Path(sys.argv[2]), stages=64, stage_bytes=1 << 20)
    cache = _native.WeightCache.open_or_create(sys.argv[1], 256 << 20)
    model = plan.acquire(cache)
    assert model.is_loader and model.pin()
    cache.set_demand(key(0), True)
    print("loading", flush=True)
    model.load(plan.jobs, 1)
    sys.stdin.readline()
"""


def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_eight_processes_that_want_a_model_at_once_read_it_once(region_path, tmp_path):
    plan = plain(tmp_path / "file", stages=16, stage_bytes=STAGE)
    readers = [start(READER, region_path, plan.path, tmp_path / f"{n}") for n in range(8)]
    try:
        for reader in readers:
            assert reader.stdout.readline() == "ready\n"
        for reader in readers:
            reader.stdin.write("go\n")
            reader.stdin.flush()
        for reader in readers:
            assert reader.stdout.readline() == "checked\n"
        cache = _native.WeightCache.open_or_create(region_path, BUDGET)
        assert cache.bytes_read == plan.size_bytes
        (entry,) = cache.status()
        assert sorted(entry.pin_pids) == sorted(reader.pid for reader in readers)
        assert not cache.evict(key(0))
    finally:
        for reader in readers:
            reader.kill()
            reader.communicate()
    assert cache.status()[0].pin_pids == []
    assert cache.evict(key(0))


def kill_half_way(region_path, plan, cache, disk):
    """Return a waiter whose loader was killed in the middle of a read."""
    disk.fails("hang", plan.path.name, first=3)
    loader = start(HALF_LOADER, region_path, plan.path, **disk.environment)
    try:
        assert loader.stdout.readline() == "loading\n"
        waiter = plan.acquire(cache)
        assert not waiter.is_loader
        assert waiter.wait_stage(1, 30.0)
        assert not waiter.wait_stage(plan.stages, 0.1)
        assert not waiter.take_over(), "its loader is alive"
    finally:
        loader.kill()
        loader.communicate()
    return waiter


def test_a_load_whose_process_is_killed_is_finished_by_one_who_waits(region_path, tmp_path):
    plan = plain(tmp_path / "file", stages=64, stage_bytes=STAGE)
    cache = _native.WeightCache.open_or_create(region_path, BUDGET)
    waiter = kill_half_way(region_path, plan, cache, BadDisk(tmp_path))
    done = waiter.stages_done
    assert waiter.take_over()
    waiter.load(plan.jobs, 2)
    # What the dead loader had published is not read again; what it had read it could not count.
    assert 0 < cache.bytes_read == plan.size_bytes - STAGE * done < plan.size_bytes
    plan.check(waiter)
    assert cache.status()[0].pin_pids == []
    assert cache.evict(key(0))


def test_an_abandoned_half_load_makes_room_for_others(region_path, tmp_path):
    plan = plain(tmp_path / "file", stages=64, stage_bytes=STAGE)
    cache = _native.WeightCache.open_or_create(region_path, BUDGET)
    loader = start(HALF_LOADER, region_path, tmp_path / "file")
    assert loader.stdout.readline() == "loading\n"
    loader.kill()
    loader.communicate()
    model = cache.acquire(key(1), "other", BUDGET, 1, 5.0)
    assert model.is_loader
    assert cache.used_bytes == BUDGET
    assert [one.model for one in cache.evictions()] == ["model 0"]
    assert plan.path.exists()
    model.close()
    assert cache.evict(key(1))


def test_a_killed_client_gives_its_slot_back(region_path):
    caches = [_native.WeightCache.open_or_create(region_path, BUDGET) for _ in range(63)]
    code = "import sys\nfrom aegaeon import _native\n"
    code += f"cache = _native.WeightCache.open_or_create(sys.argv[1], {BUDGET})\n"
    code += "print('in', flush=True)\nsys.stdin.readline()"
    client = start(code, region_path)
    assert client.stdout.readline() == "in\n"
    with pytest.raises(RegionError, match="has 64 clients"):
        _native.WeightCache.open_or_create(region_path, BUDGET)
    client.kill()
    client.communicate()
    assert _native.WeightCache.open_or_create(region_path, BUDGET) is not None
    del caches


def test_killed_loaders_leave_a_cache_that_works_and_holds_its_budget(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.kill_loaders", str(tmp_path), "1", "150"],
        capture_output=True, text=True, timeout=100, check=False, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    killed, _, loading, preparing = map(int, re.findall(r"\d+", result.stdout))
    assert killed == 150
    # Else the kills have missed what they are aimed at.
    assert loading > 0
    assert preparing > 0

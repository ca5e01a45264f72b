"""Models of the weight cache whose small pages the kernel moves into huge ones."""

import threading
from pathlib import Path

import numpy as np
import pytest

from aegaeon import _native
from tests.support.weight_files import key, plain

HUGE = 2 << 20


@pytest.fixture
def model(region_path, tmp_path):
    """Three huge pages and a part of one, loaded."""
    cache = _native.WeightCache.open_or_create(region_path, 16 << 20)
    plan = plain(tmp_path / "file", stages=1, stage_bytes=3 * HUGE + 12_288)
    model = plan.acquire(cache)
    model.load(plan.jobs, 1)
    yield model
    model.close()
    assert cache.evict(key(0))
    cache.close()


def huge_bytes(address: int) -> int:
    """Return how much of the mapping at `address` lies in huge pages."""
    is_ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith(f"{address:x}-"):
            is_ours = True
        elif is_ours and line.startswith("ShmemPmdMapped:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("not mapped")


def gather(model) -> bool:
    gathered = [model.gather(offset) for offset in range(0, 3 * HUGE, HUGE)]
    return all(gathered)


def test_gathered_pages_are_huge_and_hold_what_they_held(model):
    before = np.frombuffer(model, np.uint8).copy()
    if not gather(model):
        pytest.skip("this system gathers no pages (Linux 6.1 does)")
    assert huge_bytes(model.address) == 3 * HUGE
    assert np.array_equal(np.frombuffer(model, np.uint8), before)
    assert gather(model)  # again changes nothing


def test_others_read_meanwhile(model):
    wanted = np.frombuffer(model, np.uint8).copy()
    wrong, is_over = [], threading.Event()

    def read():
        while not is_over.is_set():
            if not np.array_equal(np.frombuffer(model, np.uint8), wanted):
                wrong.append(1)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(20):
        gather(model)
    is_over.set()
    for reader in readers:
        reader.join()
    assert not wrong


@pytest.mark.parametrize("offset", [1, 4096, 3 * HUGE, 1 << 40])
def test_only_whole_huge_pages_of_the_model_can_be_gathered(model, offset):
    with pytest.raises(ValueError, match="no huge page of"):
        model.gather(offset)


def test_a_model_that_is_gone_is_left_alone(model):
    model.close()
    assert not model.gather(0)


def test_no_pin_is_left_when_it_is_closed_meanwhile(region_path, tmp_path):
    cache = _native.WeightCache.open_or_create(region_path, 16 << 20)
    plan = plain(tmp_path / "file", stages=1, stage_bytes=2 * HUGE)
    for _ in range(30):
        model = plan.acquire(cache)
        if model.is_loader:
            model.load(plan.jobs, 1)
        gathering = threading.Thread(target=lambda held=model: [held.gather(0) for _ in range(20)])
        gathering.start()
        model.close()
        gathering.join()
        assert [entry.pin_pids for entry in cache.status()] == [[]]
    assert cache.evict(key(0))
    cache.close()

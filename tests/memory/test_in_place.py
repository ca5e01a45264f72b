"""Weights used where the node's cache has them: what each of several instances finds there."""

import mmap
import os
import threading
import time
from pathlib import Path

import pytest

from aegaeon._native import WeightCache
from aegaeon.errors import BudgetTooSmall, CheckpointError, LoadStalled, WeightsEvicted
from aegaeon.memory.host_model import HostModel, Reading
from aegaeon.memory.in_place import InPlaceWeights
from aegaeon.memory.source import WeightSource
from aegaeon.memory.traffic import Traffic
from aegaeon.models.references import resolve
from tests.support.checkpoints import make_checkpoint
from tests.support.polling import eventually
from tests.support.regions import own_regions

READERS = 2


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    paths = [make_checkpoint(root / name, "llama", seed=ord(name)) for name in "abc"]
    return {path.name: resolve(str(path), str(root)) for path in paths}


@pytest.fixture
def regions():
    with own_regions() as regions:
        yield regions


@pytest.fixture
def open_weights(specs, regions):
    """Makes as many instances' weights over one cache as asked for."""
    opened = []

    def open_one(models=2.5, only=tuple("abc")):
        size = specs["a"].weight_bytes
        cache = WeightCache.open_or_create(regions.weights, int(models * size))
        chosen = tuple(specs[name] for name in only)
        weights = InPlaceWeights(
            WeightSource(cache, chosen, Reading(READERS, Traffic())), lambda _, packed: packed
        )
        opened.append(weights)
        return weights

    yield open_one
    for weights in opened:
        weights.close()


def content(weights, model):
    with weights.use(model) as packed:
        packed.stages.await_stage(packed.plan.stages - 1)
        return bytes(memoryview(weights._models[model].host.memory))


def data_files(regions):
    path = Path(regions.weights)
    return sorted(path.parent.glob(f"{path.name}+*"))


def test_two_instances_share_one_copy(open_weights, regions, specs):
    one, other = open_weights(), open_weights()
    one.bring_in("a", ())
    other.bring_in("a", ())
    assert content(one, "a") == content(other, "a")
    assert len(data_files(regions)) == 1
    assert one.used_bytes == other.used_bytes
    assert specs["a"].weight_bytes <= one.used_bytes < specs["a"].weight_bytes + 4096


def test_a_model_evicted_for_another_is_named_and_cannot_be_used(open_weights, regions):
    weights = open_weights()
    for model in "ab":
        weights.bring_in(model, ())
    content(weights, "a")
    brought = weights.bring_in("c", ("a",))
    assert len(brought.evicted) == 1
    with pytest.raises(WeightsEvicted), weights.use(brought.evicted[0]):
        pass
    assert len(data_files(regions)) == 2


def test_another_instance_takes_the_room_of_what_is_not_in_use(open_weights):
    one, other = open_weights(models=1.2), open_weights(models=1.2)
    one.bring_in("a", ())
    with one.use("a"), pytest.raises(BudgetTooSmall, match=f"pid.*{os.getpid()}"):
        other._source._cache.acquire(b"k" * 32, "b", one.used_bytes, 1, 0.0)
    before = content(one, "a")
    other.bring_in("b", ())
    with pytest.raises(WeightsEvicted), one.use("a"):
        pass
    one.bring_in("a", ())
    assert content(one, "a") == before


def test_bringing_in_what_is_here_reads_nothing(open_weights):
    weights = open_weights()
    weights.bring_in("a", ())
    first = content(weights, "a")
    cache = weights._source._cache
    eventually(lambda: cache.bytes_read > 0)
    read = cache.bytes_read
    assert weights.bring_in("a", ()).evicted == ()
    assert content(weights, "a") == first
    assert cache.bytes_read == read


def test_a_file_that_has_changed_is_another_model(open_weights, specs, tmp_path):
    weights = open_weights()
    weights.bring_in("a", ())
    before = content(weights, "a")
    file = Path(specs["a"].path) / "model.safetensors"
    whole = file.read_bytes()
    other = (Path(specs["b"].path) / "model.safetensors").read_bytes()
    try:
        file.write_bytes(other)
        weights.bring_in("a", ())
        assert content(weights, "a") != before
    finally:
        file.write_bytes(whole)


def test_a_file_that_is_cut_off_fails_its_own_model_only(open_weights, specs):
    weights = open_weights()
    file = Path(specs["b"].path) / "model.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match="damaged"):
            weights.bring_in("b", ())
        weights.bring_in("a", ())
        content(weights, "a")
    finally:
        file.write_bytes(whole)
    weights.bring_in("b", ())
    content(weights, "b")


def test_a_load_that_stalls_is_put_off_and_found_again(open_weights, monkeypatch):
    monkeypatch.setattr("aegaeon.memory.host_model.STALL_S", 0.0)
    gate = threading.Event()
    arrive = HostModel._arrive

    def arrive_later(host, is_loader):
        gate.wait(30)
        arrive(host, is_loader)

    monkeypatch.setattr(HostModel, "_arrive", arrive_later)
    weights = open_weights()
    for _ in range(2):
        with pytest.raises(LoadStalled):
            weights.bring_in("a", ())
    assert weights.used_bytes > 0
    # Who has waited once only looks: others' loads are not kept waiting each time.
    monkeypatch.setattr("aegaeon.memory.host_model.STALL_S", 60.0)
    began_s = time.monotonic()
    with pytest.raises(LoadStalled):
        weights.bring_in("a", ())
    assert time.monotonic() - began_s < 30.0
    gate.set()
    eventually(lambda: brings_in(weights, "a"))
    assert content(weights, "a")


def brings_in(weights, model):
    try:
        weights.bring_in(model, ())
    except LoadStalled:
        return False
    return True


def test_a_stopped_holder_of_the_lock_keeps_nobody_from_looking(regions, open_weights):
    weights = open_weights()
    weights.bring_in("a", ())
    used = weights.used_bytes
    with Path(regions.weights).open("r+b") as region, mmap.mmap(region.fileno(), 0) as memory:
        # The lock is the first word of the body; its holder lives, and does not let go.
        words = [memory[at : at + 8] for at in range(4104, 8192, 8)]
        own = [word for word in words if int.from_bytes(word, "little") >> 42 == os.getpid()]
        memory[4096:4104] = own[0]
        assert weights.used_bytes == used
        memory[4096:4104] = bytes(8)


def test_a_model_asked_for_again_is_wanted_again(open_weights):
    weights = open_weights()
    weights.set_demand("a", True)
    weights.bring_in("a", ())
    weights.bring_in("b", ("a",))
    weights.bring_in("a", ())
    entries = {entry.model: entry for entry in weights._source._cache.status()}
    assert entries["a"].demand_pids == [os.getpid()]
    assert entries["b"].demand_pids == []


def test_using_a_model_makes_it_no_longer_idle(open_weights):
    weights = open_weights()
    weights.bring_in("a", ())
    weights.bring_in("b", ())
    content(weights, "a")
    idle_s = {entry.model: entry.idle_s for entry in weights._source._cache.status()}
    assert idle_s["a"] < idle_s["b"]

"""Models of the weight cache, which has them mapped read-only, locked for a device."""

import ctypes
import logging

import pytest
import torch

from aegaeon._native import WeightCache
from aegaeon.memory.area import Locks
from aegaeon.memory.budget import CUDA_CHUNK_BYTES
from aegaeon.memory.host_model import Reading
from aegaeon.memory.source import WeightSource
from aegaeon.memory.traffic import Traffic
from aegaeon.models.references import resolve
from tests.support.checkpoints import make_checkpoint
from tests.support.cuda_stand_in import EAGER, cuda_device
from tests.support.regions import own_regions


@pytest.fixture
def stand_in():
    with cuda_device(EAGER) as module:
        yield module


@pytest.fixture
def whole(stand_in, tmp_path):
    """Opens a model, wholly in and locked where the device takes it, and closes it again."""
    spec = resolve(str(make_checkpoint(tmp_path / "a", "llama")), str(tmp_path))

    def open_whole():
        locks = Locks(stand_in.CudaDevice(0))
        before = stand_in.left_over()
        with own_regions() as regions:
            cache = WeightCache.open_or_create(regions.weights, 2 * spec.weight_bytes)
            source = WeightSource(cache, (spec,), Reading(2, Traffic(), locks))
            host = source.open("a")
            host.await_stage(host.plan.stages - 1)
            host._arrival.join()
            locked = stand_in.left_over() - before
            source.take_back(host)
            source.close()
        assert stand_in.left_over() == before
        return locked

    return open_whole


def test_a_cached_model_is_locked_while_it_is_mapped(whole, caplog):
    caplog.set_level(logging.INFO)
    assert whole() == 1
    assert "locked what=the weights of a" in caplog.text


def test_a_driver_that_cannot_is_told_once(whole, stand_in, caplog):
    stand_in.lock_read_only(False, False)
    assert whole() == 0
    [warning] = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert "mapped read-only" in warning and "a newer driver may" in warning


def test_a_limit_of_the_system_is_told_with_its_remedy(whole, stand_in, caplog):
    stand_in.refuse_registration(True)
    assert whole() == 0
    assert "ulimit -l unlimited" in caplog.text and "memlock=-1" in caplog.text


def test_an_interruption_that_raises_locks_nothing(stand_in):
    device = stand_in.CudaDevice(0)
    before = stand_in.left_over()
    memory = bytearray(1 << 16)

    def is_wanted():
        raise KeyboardInterrupt

    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with pytest.raises(KeyboardInterrupt):
        device.pin(address, len(memory), False, is_wanted)
    assert stand_in.left_over() == before
    assert device.pin(address, len(memory), False, lambda: True) == ""
    assert "locked already" in device.pin(address, 4096)
    device.unpin(address)
    assert stand_in.left_over() == before


@pytest.mark.parametrize(
    ("name", "link_gb_per_s", "least_share"),
    [("PCIe 4", 25, 0.98), ("PCIe 5", 55, 0.96), ("NVLink-C2C", 400, 0.79)],
)
def test_chunks_are_long_enough_for_the_link(stand_in, name, link_gb_per_s, least_share):
    """On a modelled clock by which every copy takes 10 us before its first byte."""
    size = 8 * CUDA_CHUNK_BYTES
    memory = torch.zeros(size, dtype=torch.uint8)
    device = stand_in.CudaDevice(0)
    target = device.allocate(size)
    engine = device.copy_engine(CUDA_CHUNK_BYTES)
    assert device.pin(memory.data_ptr(), size) == ""
    stand_in.set_link(link_gb_per_s * 1e9, 10e-6)
    began_s = stand_in.now_s()
    ticket = engine.submit([(target.address, memory.data_ptr(), size)])
    assert ticket.wait(timeout_s=30.0), ticket.failure
    share = size / (stand_in.now_s() - began_s) / (link_gb_per_s * 1e9)
    assert least_share < share < 1, f"{name} is used to {share:.2f}"
    engine.close()
    device.unpin(memory.data_ptr())

"""Loading and evicting inside a byte budget; evicted memory goes back to the system."""

import os
from pathlib import Path

import pytest
import torch

from aegaeon.device.cpu import CpuDevice
from aegaeon.errors import BudgetTooSmall
from aegaeon.memory.weights import Weights
from tests.support.decoder import make_spec


class Block:
    """A model of many tensors, some below and some above malloc's mmap threshold."""

    def __init__(self, weight_bytes: int) -> None:
        sizes = [16 << 10, 100 << 10, 884 << 10, 3 << 20]
        self.tensors = []
        while self.weight_bytes < weight_bytes:
            self.tensors.append(torch.ones(sizes[len(self.tensors) % 4] // 4))

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_evicting_gives_the_memory_back():
    weights = Weights(1 << 30, CpuDevice(), lambda path, device: Block(200 << 20))
    weights.load(make_spec("a"))
    weights.evict("a")
    before = resident_bytes()
    weights.load(make_spec("a"))
    weights.load(make_spec("b"))
    assert resident_bytes() - before > 380 << 20
    weights.evict("a")
    assert resident_bytes() - before < 230 << 20
    weights.evict("b")
    assert resident_bytes() - before < 30 << 20
    assert weights.used_bytes == 0


def test_a_model_that_does_not_fit_is_refused_before_it_is_read():
    read = []
    weights = Weights(100, CpuDevice(), lambda path, device: read.append(path))
    with pytest.raises(BudgetTooSmall, match=r"needs 101 bytes .* 0 of 100 .*--model-cache-budget"):
        weights.load(make_spec("a", weight_bytes=101))
    assert not read


def test_a_model_larger_than_it_said_is_refused():
    weights = Weights(1000, CpuDevice(), lambda path, device: Block(5000))
    with pytest.raises(BudgetTooSmall):
        weights.load(make_spec("a", weight_bytes=10))
    assert weights.get("a") is None and weights.used_bytes == 0


def test_loading_twice_reads_once():
    read = []

    def loader(path, device):
        read.append(path)
        return Block(5000)

    weights = Weights(1 << 20, CpuDevice(), loader)
    assert weights.load(make_spec("a")) == weights.load(make_spec("a")) == weights.used_bytes
    assert read == ["a"]

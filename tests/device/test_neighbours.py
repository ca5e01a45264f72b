"""Pools of threads that share a node's processors: who computes, and that no bit shows it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from aegaeon import _native
from aegaeon.device.base import Projection
from aegaeon.device.cpu import CpuDevice
from aegaeon.device.neighbours import clear_seat
from aegaeon.device.packed import pack
from aegaeon.errors import RegionMismatch

BODY = 4096  # the header's bytes


def seats(path: Path) -> bytes:
    return path.read_bytes()[BODY : BODY + 64]


def computes_at(path: Path, seat: int, is_computing: bool = True) -> None:
    with path.open("r+b") as region:
        region.seek(BODY + seat)
        region.write(bytes([is_computing]))


def products(device: CpuDevice) -> torch.Tensor:
    torch.manual_seed(1)
    x, matrix = torch.randn(7, 300), pack(torch.randn(500, 300), torch.bfloat16)
    return device.linear(x, Projection((matrix,)))


@pytest.mark.parametrize("computing", [0, 1, 2, 60])
def test_a_product_is_the_same_however_many_compute_beside_it(tmp_path, computing):
    path = tmp_path / "neighbours"
    device = CpuDevice(4, neighbours=str(path), seat=0)
    for seat in range(1, 1 + computing):
        computes_at(path, seat)
    expected = products(CpuDevice())
    for _ in range(20):
        assert torch.equal(products(device), expected)
    for seat in range(1, 1 + computing):  # threads that slept come back
        computes_at(path, seat, is_computing=False)
    assert torch.equal(products(device), expected)


def test_threads_beyond_its_part_sleep(tmp_path):
    path = tmp_path / "neighbours"
    before = set(threads())
    device = CpuDevice(3, neighbours=str(path), seat=0)
    workers = set(threads()) - before
    assert len(workers) == 2
    for seat in (1, 2, 3):
        computes_at(path, seat)
    products(device)
    time.sleep(0.01)  # those that spun sleep by now
    used_ns = {worker: processor_ns(worker) for worker in workers}
    for _ in range(20):
        products(device)
    assert used_ns == {worker: processor_ns(worker) for worker in workers}
    for seat in (1, 2, 3):
        computes_at(path, seat, is_computing=False)
    for _ in range(20):
        products(device)
    assert all(processor_ns(worker) > used_ns[worker] for worker in workers)


def threads() -> list[int]:
    return [int(path.name) for path in Path("/proc/self/task").iterdir()]


def processor_ns(thread: int) -> int:
    return int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0])


def test_whoever_takes_the_seat_of_one_that_died_computing_clears_it(tmp_path):
    path = tmp_path / "neighbours"
    first = CpuDevice(2, neighbours=str(path), seat=0)
    computes_at(path, 3)
    assert seats(path)[3] == 1
    second = CpuDevice(2, neighbours=str(path), seat=3)
    assert seats(path) == bytes(64)
    assert torch.equal(products(first), products(second))


def test_a_supervisor_clears_the_seat_of_one_that_died_computing_and_no_other(tmp_path):
    path = tmp_path / "neighbours"
    clear_seat(str(path), 0)  # nobody has been there
    clear_seat("", 0)
    assert not path.exists()
    CpuDevice(2, neighbours=str(path), seat=0)
    computes_at(path, 3)
    computes_at(path, 5)
    clear_seat(str(path), 3)
    assert seats(path) == bytes(5) + b"\x01" + bytes(58)
    path.write_bytes(bytes(5000))
    with pytest.raises(RegionMismatch):
        clear_seat(str(path), 3)


def test_processes_meet_at_one_region_whoever_comes_first(tmp_path):
    path = tmp_path / "neighbours"
    program = f"from aegaeon import _native; _native.ThreadPool(2, {str(path)!r}, 1)"
    started = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(4)]
    assert [process.wait(60) for process in started] == [0] * 4
    assert seats(path) == bytes(64)


def test_what_is_no_such_region_is_refused(tmp_path):
    path = tmp_path / "neighbours"
    path.write_bytes(bytes(5000))
    with pytest.raises(RegionMismatch):
        _native.ThreadPool(2, str(path), 0)

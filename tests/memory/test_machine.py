"""What the machine has, from files made for it, and rates that are at least plausible."""

import os
import sys

import pytest

from aegaeon.errors import CheckpointError, ConfigError
from aegaeon.memory import machine
from aegaeon.memory.machine import (
    available_memory_bytes,
    measure_copy,
    measure_disk,
    read_machine,
    unused_memory_bytes,
)


def test_the_cgroup_limit_counts(tmp_path):
    whole = available_memory_bytes(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory_bytes(tmp_path) == whole > 1 << 20
    (tmp_path / "memory.max").write_text("123456\n")
    assert available_memory_bytes(tmp_path) == 123456


def fake_space(monkeypatch, blocks: int, free: int) -> None:
    values = (4096, 4096, blocks, free, free, 0, 0, 0, 0, 255)
    monkeypatch.setattr(machine.os, "statvfs", lambda _: os.statvfs_result(values))


def test_what_an_earlier_server_left_is_as_good_as_free(tmp_path, monkeypatch):
    left = tmp_path / "left"
    left.write_bytes(b"x" * 8192)
    os.sync()
    fake_space(monkeypatch, 1000, 10)
    blocks = left.stat().st_blocks
    seen = read_machine([left, tmp_path / "gone"])
    assert seen.shared_free_bytes == 10 * 4096 + 512 * blocks > 10 * 4096


def test_a_tmpfs_without_a_limit_has_all_memory_free(monkeypatch):
    fake_space(monkeypatch, 0, 0)
    seen = read_machine()
    assert seen.shared_free_bytes == seen.memory_bytes == available_memory_bytes()


def test_no_shared_memory_is_told_with_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match="mount a tmpfs"):
        read_machine(directory=tmp_path / "none")


def test_unused_memory_is_what_the_kernel_estimates(tmp_path):
    meminfo = tmp_path / "meminfo"
    assert unused_memory_bytes(meminfo) == sys.maxsize
    meminfo.write_text("MemTotal:  30 kB\nMemAvailable:      20 kB\nMemFree: 9 kB\n")
    assert unused_memory_bytes(meminfo) == 20 * 1024
    assert read_machine().unused_bytes < sys.maxsize


@pytest.mark.parametrize("size", [1, 4096, (5 << 20) + 7])
def test_a_file_of_any_size_has_a_rate(size, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"w" * size)
    assert measure_disk(path).bytes_per_s > 0


def test_a_probe_stops_when_its_time_is_over(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"w" * (16 * machine.DISK_PROBE_CHUNK_BYTES))
    reads = []
    preadv = os.preadv

    def counted(descriptor, buffers, offset):
        reads.append(offset)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(machine.os, "preadv", counted)
    monkeypatch.setattr(machine, "DISK_PROBE_S", 0.0)
    measure_disk(path)
    assert len(reads) == machine.DISK_PROBE_THREADS


def test_a_refused_direct_read_falls_back_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"w" * 100)
    read_rate = machine._read_rate

    def refuse(path, size, flags):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return read_rate(path, size, flags)

    monkeypatch.setattr(machine, "_read_rate", refuse)
    assert measure_disk(path).is_direct is False


def test_an_unreadable_file_is_an_error_of_its_own(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read"):
        measure_disk(tmp_path / "none")
    with pytest.raises(CheckpointError, match="cannot read"):
        measure_disk(tmp_path)


def test_memory_copies_at_some_rate(monkeypatch):
    monkeypatch.setattr(machine, "COPY_PROBE_BYTES", 1 << 20)
    assert measure_copy() > 0

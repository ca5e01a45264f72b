"""What the machine has and how fast it is: memory, /dev/shm, reads from disk, copies. No torch.

Rates are measured in some tens of milliseconds each, for predictions; nothing else relies on them.
"""

import mmap
import os
import re
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from aegaeon import _native
from aegaeon.config import Settings
from aegaeon.errors import CheckpointError, ConfigError

SHARED_MEMORY = Path("/dev/shm")
CGROUP_ROOT = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")

DISK_PROBE_S = 0.04
DISK_PROBE_THREADS = 4
DISK_PROBE_CHUNK_BYTES = 2 << 20
COPY_PROBE_BYTES = 32 << 20  # beyond most caches
COPY_PROBE_RUNS = 3


class Machine(msgspec.Struct, frozen=True):
    """What all processes of a node share: `shared_free_bytes` are those of /dev/shm, `unused_bytes`
    those of memory that nobody uses now; shares are not made of these, which come and go.
    `device_bytes` are those of a device that has memory of its own, where they were asked for."""

    memory_bytes: int
    shared_free_bytes: int
    unused_bytes: int = sys.maxsize
    device_bytes: int = 0


class DiskRate(msgspec.Struct, frozen=True):
    """How fast a file was read; not `is_direct` where its file system refuses O_DIRECT, and then
    part of it may have come out of the page cache."""

    bytes_per_s: float
    is_direct: bool


def read_machine(own_files: Iterable[Path] = (), directory: Path = SHARED_MEMORY) -> Machine:
    """Look at memory and at `directory`, the file system of shared memory.

    `own_files` are what an earlier server of this domain left there: as good as free. Raises
    ConfigError when there is no such directory.
    """
    memory_bytes, own_bytes = available_memory_bytes(), sum(map(_allocated_bytes, own_files))
    unused_bytes = unused_memory_bytes() + own_bytes
    try:
        space = os.statvfs(directory)
    except OSError as error:
        raise ConfigError(
            f"cannot use {directory} ({error.strerror}); weights and KV live there: mount a tmpfs"
        ) from None
    if space.f_blocks == 0:  # a tmpfs without a limit
        return Machine(memory_bytes, memory_bytes, unused_bytes)
    free_bytes = space.f_bavail * space.f_frsize
    return Machine(memory_bytes, free_bytes + own_bytes, unused_bytes)


def with_device(machine: Machine, settings: Settings) -> Machine:
    """Return `machine` with the memory of the device that the settings name. Raises DeviceError
    when there is no such device."""
    if settings.cuda_number is None:
        return machine
    total_bytes = _native.cuda_total_bytes(settings.cuda_number)
    return msgspec.structs.replace(machine, device_bytes=total_bytes)


def _allocated_bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:  # gone meanwhile
        return 0


def available_memory_bytes(cgroup_root: Path = CGROUP_ROOT) -> int:
    """Return physical memory, or the cgroup's limit where that is less."""
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (cgroup_root / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():  # "max" is no limit
            limit = min(limit, int(text))
    return limit


def unused_memory_bytes(meminfo: Path = MEMINFO) -> int:
    """Return the memory that could be had without swapping, as the kernel estimates it; without
    bound where it does not tell."""
    try:
        text = meminfo.read_text(encoding="ascii")
    except OSError:
        return sys.maxsize
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else sys.maxsize


def resident_bytes(process: int | None = None) -> int:
    """Return what `process`, or this one, has in memory. Raises OSError where it has ended."""
    name = "self" if process is None else process
    text = Path(f"/proc/{name}/statm").read_text(encoding="ascii")
    return int(text.split()[1]) * mmap.PAGESIZE


def measure_disk(path: Path) -> DiskRate:
    """Read parts of the file at `path` for a moment, several at a time, past the page cache.

    Raises CheckpointError when it cannot be read.
    """
    try:
        size = path.stat().st_size
        try:
            return DiskRate(_read_rate(path, size, os.O_DIRECT), is_direct=True)
        except OSError:
            return DiskRate(_read_rate(path, size, 0), is_direct=False)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path} ({error.strerror}); download or import the model again"
        ) from None


def _read_rate(path: Path, size: int, flags: int) -> float:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        chunks = max(1, -(-size // DISK_PROBE_CHUNK_BYTES))
        started = time.perf_counter()

        def read(first: int) -> int:
            done = 0
            with mmap.mmap(-1, DISK_PROBE_CHUNK_BYTES) as buffer:  # aligned, as O_DIRECT asks for
                for chunk in range(first, chunks, DISK_PROBE_THREADS):
                    done += os.preadv(descriptor, [buffer], chunk * DISK_PROBE_CHUNK_BYTES)
                    if time.perf_counter() - started > DISK_PROBE_S:
                        break
            return done

        with ThreadPoolExecutor(DISK_PROBE_THREADS) as readers:
            done = sum(readers.map(read, range(DISK_PROBE_THREADS)))
        return max(1, done) / (time.perf_counter() - started)
    finally:
        os.close(descriptor)


def measure_copy() -> float:
    """Return how many bytes per second one thread copies in memory, the best of a few runs."""
    with mmap.mmap(-1, COPY_PROBE_BYTES) as source, mmap.mmap(-1, COPY_PROBE_BYTES) as target:
        source[:] = b"\1" * COPY_PROBE_BYTES
        best_s = float("inf")
        with memoryview(source) as read, memoryview(target) as written:
            for _ in range(1 + COPY_PROBE_RUNS):  # the first touches the pages
                started = time.perf_counter()
                written[:] = read
                best_s = min(best_s, time.perf_counter() - started)
    return COPY_PROBE_BYTES / best_s

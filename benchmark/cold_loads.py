"""Ways to bring a checkpoint from the disk into memory: ours, other libraries', and bare reads."""

import gc
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file

from aegaeon._native import WeightCache
from aegaeon.memory.budget import READER_THREADS
from aegaeon.memory.host_model import Reading
from aegaeon.memory.source import WeightSource
from aegaeon.memory.traffic import Traffic
from aegaeon.types import ModelSpec

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20


def drop_from_page_cache(path: Path) -> None:
    """Make the next read of `path` one from the disk."""
    gc.collect()  # what is mapped stays
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


class OurLoad:
    """Loads a model into a weight cache of its own, packed, until every stage is in."""

    def __init__(self, spec: ModelSpec, region: str, is_ready: bool = True) -> None:
        """Name the region, which goes with each load. `make_ready` does what an idle server does
        before, or nothing."""
        self._spec = spec
        self._region = Path(region)
        self._is_ready = is_ready

    def make_ready(self) -> None:
        """Have memory for the next load."""
        if self._is_ready:
            self._open().prepare(self._spec.weight_bytes)

    def _open(self) -> WeightCache:
        return WeightCache.open_or_create(str(self._region), budget_of(self._spec))

    def __call__(self) -> float:
        cache = self._open()
        source = WeightSource(cache, (self._spec,), Reading(READER_THREADS, Traffic()))
        try:
            start = time.perf_counter()
            host = source.open(self._spec.id)
            host.await_stage(host.plan.stages - 1)
            took_s = time.perf_counter() - start
            host.close()
        finally:
            source.close()
            remove_region(self._region)
        return took_s


def budget_of(spec: ModelSpec) -> int:
    """Return a cache's budget for one model, whose last page of memory may be a huge one."""
    return spec.weight_bytes + HUGE_PAGE_BYTES


def remove_region(region: Path) -> None:
    """Remove a region and the data files beside it."""
    for path in region.parent.glob(f"{region.name}*"):
        path.unlink()


class BareReads:
    """Reads a file by `threads` threads past the page cache, into buffers that are used again.

    They are made of huge pages where the system has them, which saves the kernel work.
    """

    def __init__(self, path: Path, threads: int, chunk_bytes: int) -> None:
        """Touch the buffers."""
        self.name = f"{threads} threads, {chunk_bytes >> 20} MiB"
        self._path = path
        self._chunk_bytes = chunk_bytes
        self._size_bytes = path.stat().st_size
        self._buffers = [mmap.mmap(-1, chunk_bytes) for _ in range(threads)]
        for buffer in self._buffers:
            buffer.madvise(mmap.MADV_HUGEPAGE)
            buffer.write(bytes(chunk_bytes))

    def __call__(self) -> float:
        descriptor = _open_direct(self._path)
        offsets = iter(range(0, self._size_bytes, self._chunk_bytes))
        lock = threading.Lock()
        workers = [
            threading.Thread(target=self._read, args=(descriptor, offsets, lock, buffer))
            for buffer in self._buffers
        ]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        took_s = time.perf_counter() - start
        os.close(descriptor)
        return took_s

    def _read(
        self, descriptor: int, offsets: Iterator[int], lock: threading.Lock, buffer: mmap.mmap
    ) -> None:
        while True:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            os.preadv(descriptor, [buffer], offset)


def _open_direct(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return os.open(path, os.O_RDONLY)  # a file system without


Load = Callable[[], float]


def peers(path: Path) -> tuple[dict[str, Load], list[str]]:
    """Return the loads of the libraries that are installed, and the names of the others.

    All hold every tensor at the end, in memory.
    """
    ways: dict[str, tuple[str, Callable[[Path], object]]] = {
        "safetensors": ("safetensors", _safetensors),
        "runai-model-streamer": ("runai_model_streamer", _runai),
        "fastsafetensors": ("fastsafetensors", _fastsafetensors),
    }
    found = {name: way for name, (module, way) in ways.items() if find_spec(module)}
    return {name: _timed(way, path) for name, way in found.items()}, sorted(set(ways) - set(found))


def _timed(load: Callable[[Path], object], path: Path) -> Load:
    def run() -> float:
        start = time.perf_counter()
        kept = load(path)
        took_s = time.perf_counter() - start
        del kept
        return took_s

    return run


def _safetensors(path: Path) -> object:
    tensors = load_file(path)
    for tensor in tensors.values():
        # It maps the file: read is what somebody looks at, and a byte of each page is enough.
        tensor.flatten().view(torch.uint8)[::PAGE_BYTES].max()
    return tensors


def _runai(path: Path) -> object:
    with import_module("runai_model_streamer").SafetensorsStreamer() as streamer:
        streamer.stream_file(str(path))
        return dict(streamer.get_tensors())


def _fastsafetensors(path: Path) -> object:
    with import_module("fastsafetensors").fastsafe_open([str(path)], "pt", nogds=True) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping

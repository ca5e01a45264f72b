"""Keys and values in the memory of other processes on the same device: named, opened, let go.

A process that dies leaves its memory to whoever has it open: so it is closed here at once, for its
next life needs the room. What is copied when is engine/kv_swap.py's business.
"""

import logging
import os
import select
import selectors
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from aegaeon import _native
from aegaeon.errors import DeviceError, KvGone, KvUnreachable
from aegaeon.memory.kv import BLOCK_TOKENS, KvPool, KvShape, blocks_for
from aegaeon.types import DeviceKv, KvHandle

log = logging.getLogger(__name__)


class _Opened:
    """Another process's memory; `process` is a descriptor that tells of its death."""

    def __init__(self, peer: "_native.CudaPeer", process: int) -> None:
        self.peer: _native.CudaPeer | None = peer
        self.process = process
        self.reading = threading.Lock()  # held over copies from there, and to close it


class Peers:
    """The memory of this process, `memory` on `device`, and that of the others on the device. Any
    thread may call any verb."""

    def __init__(self, device: "_native.CudaDevice", memory: "_native.CudaMemory") -> None:
        self._device = device
        self._memory = memory
        self._name = f"cuda:{device.number}"
        self._handle = b""  # of ours, once it is asked for
        self._opened: dict[tuple[int, bytes], _Opened] = {}
        self._lock = threading.Lock()
        self._watch: threading.Thread | None = None
        self._ended = selectors.DefaultSelector()
        self._wake, self._woken = os.pipe()
        self._is_closing = False

    def named(self, pool: KvPool, shape: KvShape, blocks: list[int]) -> DeviceKv:
        """Return by what others find these blocks of `pool`, which lies in our memory. Raises
        DeviceError where the driver does not share memory."""
        self._handle = self._handle or self._memory.handle()
        start_bytes = pool.pages(shape).data_ptr() - self._memory.address
        return DeviceKv(
            self._name, os.getpid(), self._handle, self._memory.size_bytes, start_bytes,
            tuple(blocks),
        )  # fmt: skip

    @contextmanager
    def reading(self, shape: KvShape, kv: KvHandle) -> Iterator[list[int]]:
        """Yield the addresses of the blocks of `kv`, from where copies may be made until the end.

        Raises KvUnreachable for memory that we cannot open; KvGone for blocks that are none, and,
        at the end too, where its process has died: what was copied may be anything then.
        """
        assert kv.device is not None
        start_bytes = _checked(shape, kv, kv.device)
        opened = self._open(kv.device)
        with opened.reading:
            if opened.peer is None:
                raise KvGone("the sender of the KV has died; prefill again")
            base = opened.peer.address + start_bytes
            yield [base + block * shape.page_bytes for block in kv.device.blocks]
            if not _is_alive(opened.process):
                raise KvGone("the sender died while its KV was copied; prefill again")

    def close(self) -> None:
        """Close all that is open, behind all copies from there. Idempotent."""
        with self._lock:
            if self._is_closing:
                return
            self._is_closing = True
        os.close(self._woken)  # which wakes the thread
        if self._watch is not None:
            self._watch.join()
        for key in tuple(self._opened):
            self._forget(key)
        self._ended.close()
        os.close(self._wake)

    def _open(self, kv: DeviceKv) -> _Opened:
        if kv.device != self._name:
            raise KvUnreachable(f"the KV is on {kv.device}, this is {self._name}")
        key = (kv.pid, kv.handle)
        with self._lock:
            if self._is_closing:
                raise KvUnreachable("this engine is closing; offer the KV to another instance")
            found = self._opened.get(key)
            if found is None:
                found = self._opened[key] = self._open_new(kv)
                self._ended.register(found.process, selectors.EVENT_READ, key)
                self._start_watch()
        if not _is_alive(found.process):
            raise KvGone("the sender of the KV has died; prefill again")
        return found

    def _open_new(self, kv: DeviceKv) -> _Opened:
        if kv.pid == os.getpid():
            raise KvUnreachable("a process cannot open its own memory of a device")
        try:
            process = os.pidfd_open(kv.pid)
        except (ProcessLookupError, OverflowError, ValueError):
            raise KvGone("the sender of the KV has died; prefill again") from None
        except (OSError, AttributeError) as error:
            raise KvUnreachable(f"cannot watch process {kv.pid} ({error})") from None
        try:
            peer = self._device.open(kv.handle, kv.size_bytes)
        except DeviceError as error:
            is_alive = _is_alive(process)
            os.close(process)
            if not is_alive:
                raise KvGone("the sender of the KV has died; prefill again") from None
            raise KvUnreachable(f"cannot open the memory of process {kv.pid}: {error}") from None
        return _Opened(peer, process)

    def _start_watch(self) -> None:
        if self._watch is None:
            self._ended.register(self._wake, selectors.EVENT_READ, None)
            self._watch = threading.Thread(target=self._tend, name="kv peers", daemon=True)
            self._watch.start()

    def _tend(self) -> None:
        while True:
            # A process that is opened meanwhile is seen at once: epoll takes it while it waits.
            for key, _ in self._ended.select():
                if key.data is None:
                    return
                log.info("closing the memory of process %d, which has ended", key.data[0])
                self._forget(key.data)

    def _forget(self, key: tuple[int, bytes]) -> None:
        with self._lock:
            opened = self._opened.pop(key)
            self._ended.unregister(opened.process)
        with opened.reading:
            opened.peer = None
        os.close(opened.process)


def _checked(shape: KvShape, kv: KvHandle, device: DeviceKv) -> int:
    """Return where pages begin, once all blocks lie in the memory: it came by mail."""
    if not 0 < kv.cached_tokens <= len(device.blocks) * BLOCK_TOKENS:
        raise KvGone(
            f"{len(device.blocks)} KV blocks do not hold {kv.cached_tokens} tokens; prefill again"
        )
    if len(device.blocks) != blocks_for(kv.cached_tokens) or device.start_bytes < 0:
        raise KvGone("the KV is not as a device keeps it; prefill again")
    room = device.size_bytes - device.start_bytes - shape.block_bytes
    if any(not 0 <= block * shape.page_bytes <= room for block in device.blocks):
        raise KvGone("the KV is not in the memory that it is said to be in; prefill again")
    return device.start_bytes


def _is_alive(process: int) -> bool:
    """Whether the process of a descriptor has not ended."""
    ended = select.poll()
    ended.register(process, select.POLLIN)
    return not ended.poll(0)

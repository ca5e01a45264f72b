"""What is done to the memory of the node's weight cache while nobody waits for it: it is made ready
ahead, and models that are in come to lie in huge pages."""

import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable

from aegaeon._native import CachedModel, WeightCache
from aegaeon.errors import AegaeonError
from aegaeon.types import ModelId, ModelSpec

log = logging.getLogger(__name__)

# How often it looks whether the last spare was used.
LOOK_S = 2.0
# And after it was found that others need the memory.
FULL_S = 10.0
# Of all priorities the lowest: what computes goes first.
NICE = 19
CLOSE_S = 5.0
HUGE_PAGE_BYTES = 2 << 20
# A system that refuses so many pages of a model gives none.
MOST_REFUSALS = 8


class SpareKeeper:
    """Keeps memory ready for the largest model of an engine that is not in the cache, as far as
    the cache has room; and gathers the pages of models that were loaded at once, into memory that
    had to be found: a token reads weights a sixth faster from huge pages. One thread, of the lowest
    priority."""

    def __init__(
        self,
        cache: WeightCache,
        specs: Iterable[ModelSpec],
        tidy: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin at once. `tidy` is called beside each look."""
        self._cache = cache
        self._tidy = tidy
        self._bytes = {spec.id: spec.weight_bytes for spec in specs}
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._loading: deque[CachedModel] = deque()
        self._thread = threading.Thread(target=self._keep, name="spare", daemon=True)
        self._thread.start()
        # Python must not end under a thread that is in native code: the process would abort.
        atexit.register(self._end)

    def put(self, spec: ModelSpec) -> None:
        """Be ready for `spec`, too."""
        self._bytes = {**self._bytes, spec.id: spec.weight_bytes}

    def take(self, model: ModelId) -> None:
        """Be ready for `model` no more."""
        self._bytes = {one: size for one, size in self._bytes.items() if one != model}

    def gather(self, memory: CachedModel) -> None:
        """Have a model that is loaded here gathered once it is in. Any thread may call it."""
        self._loading.append(memory)
        self._wake.set()

    def look_soon(self) -> None:
        """Look now rather than later. Any thread may call it."""
        self._wake.set()

    def stop(self) -> None:
        """Look no more. What is being made ready goes on until the cache is closed."""
        self._closing.set()
        self._wake.set()

    def join(self) -> None:
        """Wait for the end, after the cache was closed."""
        self._thread.join(CLOSE_S)
        atexit.unregister(self._end)

    def _end(self) -> None:
        self.stop()
        self._cache.close()
        self.join()

    def _keep(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while not self._closing.is_set():
            try:
                self._tidy()
                self._gather_loaded()
                has_room = self._look()
            except AegaeonError as error:
                if not self._closing.is_set():
                    log.warning("no memory is made ready for weights any more: %s", error)
                return
            self._wake.wait(LOOK_S if has_room or self._loading else FULL_S)
            self._wake.clear()

    def _gather_loaded(self) -> None:
        for _ in range(len(self._loading)):
            memory = self._loading.popleft()
            if memory.stages_done == memory.stages:
                self._gather_pages(memory)
            elif memory.is_loader:
                self._loading.append(memory)

    def _gather_pages(self, memory: CachedModel) -> None:
        refused = 0
        whole_bytes = memory.size_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        for offset in range(0, whole_bytes, HUGE_PAGE_BYTES):
            if self._closing.is_set() or refused == MOST_REFUSALS:
                return
            refused += not memory.gather(offset)

    def _look(self) -> bool:
        held = {entry.model for entry in self._cache.status()}
        wanted = max((size for model, size in self._bytes.items() if model not in held), default=0)
        return wanted == 0 or self._cache.prepare(wanted)

"""Keeps an engine's lanes inside the threads it was given.

torch's thread counts belong partly to the calling thread (OpenMP) and partly to the process (MKL).
The compute lane uses all of them; whoever loads uses one.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ComputeThreads:
    """Hands `threads` to the compute lane. Both lanes may be entered from any thread."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._lane = threading.Lock()
        self._local = threading.local()
        self._is_set = False
        if torch.get_num_interop_threads() != 1:
            torch.set_num_interop_threads(1)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Hold the compute lane; torch uses all threads inside."""
        with self._lane:
            if not self._is_set or getattr(self._local, "threads", 0) != self._threads:
                torch.set_num_threads(self._threads)
                self._local.threads = self._threads
                self._is_set = True
            yield

    def enter_loading(self) -> None:
        """Make the calling thread compute alone from here on.

        Setting that also changes MKL's count for the process, so the first time on a thread waits
        for the compute lane, which sets it again before its next step.
        """
        if getattr(self._local, "threads", 0) == 1:
            return
        with self._lane:
            torch.set_num_threads(1)
            self._local.threads = 1
            self._is_set = False

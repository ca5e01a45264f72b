"""One model in the node's weight cache as this process has it: awaited, pinned, let go.

Whoever comes first reads the files, on threads of its own; everybody's first layers may compute
while the last ones come in. What lies where is the cache's business.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from aegaeon._native import CachedModel
from aegaeon.errors import (
    AegaeonError,
    CheckpointError,
    LoadCancelled,
    LoadLate,
    LoadStalled,
    WeightsEvicted,
)
from aegaeon.memory.area import Locks
from aegaeon.memory.traffic import Traffic
from aegaeon.models.packing import PackPlan
from aegaeon.models.stages import Stages
from aegaeon.types import ModelId

log = logging.getLogger(__name__)

# The first layer: with it a forward pass may begin.
FIRST_STAGES = 1
# Between looks at whether the loader of a stage that is awaited still lives.
LOOK_S = 0.5
# How long a load keeps others from theirs while nothing comes in.
STALL_S = 3.0
# No stage that is still coming takes so long; a disk that hangs must not hang a step for ever.
STAGE_S = 60.0
# Between a load's end and its thread's.
ENDING_S = 0.001
# For a load that is given up to notice; one whose disk hangs ends by itself, when the disk answers.
END_S = 2.0


class Incoming(Stages, Protocol):
    """A model that comes in, and what its stages are."""

    plan: PackPlan


def await_stages(incoming: Incoming, may_begin: Callable[[], bool]) -> bool:
    """Return True when all stages are in; False between two of them once `may_begin()`, or when
    they were evicted again, which the next use tells. Raises CheckpointError."""
    try:
        for stage in range(FIRST_STAGES, incoming.plan.stages):
            if may_begin():
                return False
            incoming.await_stage(stage)
    except (WeightsEvicted, LoadCancelled) as error:
        log.debug("not wholly in error=%s", error)
        return False
    return True


@dataclass(frozen=True, slots=True)
class Reading:
    """How models get into this process: `threads` read a file, `traffic` counts what that comes to,
    `locks` lock what is in for a device that copies from there."""

    threads: int
    traffic: Traffic
    locks: Locks | None = None


class HostModel:
    """One model in the cache, mapped by this process. Its bytes stay put while it is pinned."""

    def __init__(
        self, model: ModelId, plan: PackPlan, cached: CachedModel, reading: Reading
    ) -> None:
        """Take over `cached`, which is read as `reading` says if that falls to this process."""
        self.model = model
        self.plan = plan
        self.memory = cached
        self._readers = reading.threads
        self._traffic = reading.traffic
        self._locks = reading.locks
        self._pinning = threading.Lock()
        self._is_pinned = False
        self._is_whole = False
        self._give_up_s = time.monotonic() + STAGE_S  # on the first stages
        self._has_stalled = False
        self._is_interrupted = False
        self._failure: Exception | None = None  # of a load of our own
        self._is_loading = False
        self._arrival: threading.Thread | None = None
        self._start_arrival(is_loader=cached.is_loader)

    @property
    def is_whole(self) -> bool:
        """Whether all stages are in and somebody has awaited the last one."""
        return self._is_whole

    @property
    def stages_done(self) -> int:
        """Stages that are in, counted from the first without a gap."""
        return self.memory.stages_done

    def await_first(self) -> None:
        """Return when a forward pass may begin. Raises as `await_stage`, and LoadStalled."""
        # Whoever has waited for it in vain before only looks.
        stall_s = time.monotonic() + (0.0 if self._has_stalled else STALL_S)
        while True:
            if self.memory.wait_stage(FIRST_STAGES, 0.0):
                return
            if stall_s <= time.monotonic() < self._give_up_s:
                self._has_stalled = True
                raise LoadStalled(f"{self.model} is long in coming; look whether its disk answers")
            self._look_after(FIRST_STAGES - 1, self._give_up_s)

    def await_stage(self, stage: int) -> None:
        """Return when `stage` is in. Raises CheckpointError when it cannot be read, WeightsEvicted
        when the model was evicted meanwhile."""
        if self._is_whole:
            return
        give_up_s = time.monotonic() + STAGE_S
        while not self._look_after(stage, give_up_s):
            pass
        self._is_whole = self.memory.stages_done >= self.plan.stages

    def is_in(self, stage: int) -> bool:
        """Whether `stage` is in; no stage of a model that was evicted is."""
        return self._is_whole or self.memory.stages_done > stage

    @contextmanager
    def cached(self, stage: int) -> Iterator[Any | None]:
        """Keep the memory where it is, or None where `stage` is not in. Raises as `pinned`."""
        with self.pinned():
            yield self.memory if self.is_in(stage) else None

    def _look_after(self, stage: int, give_up_s: float) -> bool:
        """Wait a moment for `stage`, say whether it is in; take the load over from the dead."""
        if self.memory.wait_stage(stage + 1, LOOK_S):
            return True
        if self._is_interrupted:
            raise LoadCancelled(f"{self.model} is not wanted here any more; load it again")
        if self._failure is not None:
            raise self._told(self._failure)
        if time.monotonic() >= give_up_s:
            raise LoadLate(
                f"the weights of {self.model} are long in coming: stage {stage} has not come "
                f"within {STAGE_S:.0f} s; look whether the disk answers"
            )
        self._take_over()
        return False

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Keep the bytes where they are. Raises WeightsEvicted when they were evicted before,
        CheckpointError when they could not be read."""
        if not self.memory.pin():
            if self._failure is not None:
                raise self._told(self._failure)
            raise WeightsEvicted(f"the weights of {self.model} were evicted; load them again")
        try:
            yield
        finally:
            self.memory.unpin()

    @property
    def is_present(self) -> bool:
        """Whether it has not been evicted, nor our load of it failed."""
        if self._failure is not None or not self.memory.pin():
            return False
        self.memory.unpin()
        return True

    def interrupt(self) -> None:
        """Make those who wait for a stage give up. What is read so far stays in the cache."""
        self._is_interrupted = True
        self.memory.cancel()

    def close(self) -> None:
        """Stop reading and let go; views of the memory keep it mapped. Idempotent.

        A read that hangs goes on behind our back, into memory that stays until it is over.
        """
        self.interrupt()
        if self._arrival is not None:
            self._arrival.join(END_S)
            if self._arrival.is_alive():
                log.warning("a read does not end, its disk hangs model=%s", self.model)
        with self._pinning:
            if self._is_pinned and self._locks is not None:
                self._is_pinned = False
                self._locks.unlock(self.memory.address)
        self.memory.close()

    def _told(self, failure: Exception) -> AegaeonError:
        """Return what those who wait are told of a load that has failed."""
        if isinstance(failure, AegaeonError):
            return failure
        return CheckpointError(f"{self.model} cannot be loaded: {failure!r}; see the log")

    def _take_over(self) -> None:
        """Load what another process has left unfinished, if one has."""
        if self._is_loading:
            # It is our own load; nobody loads it any more only when that is about to be over.
            assert self._arrival is not None
            self._arrival.join(ENDING_S)
        elif self.memory.take_over():
            log.warning("load taken over from a dead process model=%s", self.model)
            self._start_arrival(is_loader=True)

    def _start_arrival(self, is_loader: bool) -> None:
        if self._arrival is not None:
            self._arrival.join()
        self._is_loading = is_loader
        self._arrival = threading.Thread(
            target=self._arrive, args=(is_loader,), name=f"load {self.model}", daemon=True
        )
        self._arrival.start()

    def _arrive(self, is_loader: bool) -> None:
        """Read the files if that is ours to do, then map every page, so that no step has to."""
        try:
            if is_loader:
                began_s = time.monotonic()
                self.memory.load(self.plan.jobs(), self._readers)
                took_s = time.monotonic() - began_s
                self._traffic.add("disk", self.plan.load_plan.file_bytes, took_s)
            elif self.memory.stages_done >= self.plan.stages:
                self.memory.populate()
            self._pin()
        except LoadCancelled as error:
            # Whoever else awaits a stage takes the load over.
            log.debug("not loaded model=%s error=%s", self.model, error)
        except Exception as error:
            # Kept for whoever awaits a stage here; to try again is for a new load.
            is_told = isinstance(error, AegaeonError)
            log.log(
                logging.DEBUG if is_told else logging.ERROR,
                "not loaded model=%s error=%s", self.model, error,
                exc_info=None if is_told else error,
            )  # fmt: skip
            self._failure = error
        finally:
            self._is_loading = False

    def _pin(self) -> None:
        """Once it is whole: until `close`, which ends it, so that the device's later copies need no
        stage. The cache has it mapped read-only."""
        if self._locks is None or self.memory.stages_done < self.plan.stages:
            return
        place = self.memory.address, self.memory.size_bytes
        with self._pinning:
            self._is_pinned = self._locks.lock(
                f"the weights of {self.model}", place, True, lambda: not self._is_interrupted
            )

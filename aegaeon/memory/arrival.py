"""One model on its way from the node's cache to a device, stage by stage."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from aegaeon._native import CopyEngine, CopyTicket
from aegaeon.errors import AegaeonError, CheckpointError, CopyError, WeightsEvicted
from aegaeon.memory.host_model import STAGE_S, HostModel
from aegaeon.memory.traffic import Traffic
from aegaeon.models.packing import PackPlan

# Of copies: keys and values before these, then the weights that a step waits for, then the rest.
NEEDED_NOW = 1
NEEDED_LATER = 2
LOOK_S = 0.5


class _Part(NamedTuple):
    """A copy of the bytes from `first_byte` of the model on, up to the end of stage `stop` - 1."""

    stop: int
    first_byte: int
    ticket: CopyTicket


class Arrival:
    """Copies what the host has of a model as it comes there. The host's copy is pinned meanwhile.

    Owns the host model and a thread, until everything is in or `close`; then the model goes to
    `let_go`.
    """

    def __init__(
        self,
        host: HostModel,
        target: int,
        copier: CopyEngine,
        traffic: Traffic,
        let_go: Callable[[HostModel], None],
    ) -> None:
        """Begin to copy to the address `target`, which has room for the whole model."""
        self.plan: PackPlan = host.plan
        self._host = host
        self._target = target
        self._copier = copier
        self._traffic = traffic
        self._let_go = let_go
        self._changed = threading.Condition()
        self._parts: list[_Part] = []  # in order, without a gap
        self._failure: AegaeonError | None = None
        self._priority = NEEDED_LATER
        self._is_closed = False
        self._at_host = threading.Lock()  # held by who reads there, and taken to let go
        self._has_host = True
        self.is_complete = False
        self._thread = threading.Thread(target=self._feed, name="arrival", daemon=True)
        self._thread.start()

    def await_stage(self, stage: int) -> None:
        """Return when `stage` is on the device. Raises CheckpointError and WeightsEvicted."""
        if self.is_complete:
            return
        give_up_s = time.monotonic() + STAGE_S
        part = self._part_with(stage, give_up_s)
        ticket, size = part.ticket, self.plan.stage_ends[stage] - part.first_byte
        while not ticket.wait(size, LOOK_S):
            if ticket.has_failed or ticket.is_cancelled:
                raise self._lost(ticket.failure or "the copy was cancelled")
            if time.monotonic() >= give_up_s:
                raise self._late(stage)

    def is_in(self, stage: int) -> bool:
        """Whether `stage` is on the device."""
        if self.is_complete:
            return True
        with self._changed:
            part = next((part for part in self._parts if part.stop > stage), None)
        if part is None:
            return False
        return part.ticket.wait(self.plan.stage_ends[stage] - part.first_byte, 0.0)

    @contextmanager
    def cached(self, stage: int) -> Iterator[Any | None]:
        """Keep the host's memory where it is, or None where `stage` is not in there, or the host's
        model was let go. Raises CheckpointError and WeightsEvicted."""
        with self._at_host:
            if not self._has_host:
                yield None
                return
            with self._host.cached(stage) as memory:
                yield memory

    @property
    def is_lost(self) -> bool:
        """Whether the rest will never come."""
        return self._failure is not None

    def hurry(self) -> None:
        """Somebody computes with it now."""
        if self.is_complete or self._priority == NEEDED_NOW:
            return
        with self._changed:
            self._priority = NEEDED_NOW
            for part in self._parts:
                part.ticket.raise_priority(NEEDED_NOW)

    def close(self) -> None:
        """Stop; nothing touches the target any more. Idempotent."""
        with self._changed:
            self._is_closed = True
            parts = tuple(self._parts)
        for part in parts:
            part.ticket.cancel()
        if self._thread.is_alive():
            self._host.interrupt()
        self._thread.join()

    def _part_with(self, stage: int, give_up_s: float) -> _Part:
        with self._changed:
            while not self._parts or self._parts[-1].stop <= stage:
                if self._failure is not None:
                    raise self._failure
                if not self._changed.wait(max(0.0, give_up_s - time.monotonic())):
                    raise self._late(stage)
            return next(part for part in self._parts if part.stop > stage)

    def _lost(self, why: str) -> WeightsEvicted:
        return WeightsEvicted(f"{self._host.model} did not come to the device ({why}); load it")

    def _late(self, stage: int) -> CheckpointError:
        return CheckpointError(
            f"stage {stage} of {self._host.model} has not come in time; look whether the disk "
            "answers"
        )

    def _feed(self) -> None:
        try:
            with self._host.pinned():
                self._copy_as_it_comes()
                self._await_copies()
            self.is_complete = True
        except CopyError as error:
            self._fail(self._lost(str(error)))
        except AegaeonError as error:
            self._fail(error)
        finally:
            # The device has its own copy now, or will never have one.
            with self._at_host:
                self._has_host = False
            self._let_go(self._host)

    def _fail(self, failure: AegaeonError) -> None:
        with self._changed:
            self._failure = failure
            self._changed.notify_all()
        # The host's memory is about to be let go: nobody reads there any more.
        for part in self._parts:
            part.ticket.cancel()

    def _copy_as_it_comes(self) -> None:
        stages = 0
        while stages < self.plan.stages:
            self._host.await_stage(stages)
            stages = self._submit(stages, self._host.stages_done)

    def _await_copies(self) -> None:
        for part in self._parts:
            while not part.ticket.wait(timeout_s=LOOK_S):
                if part.ticket.is_cancelled or part.ticket.has_failed:
                    raise CopyError(part.ticket.failure or "the copy was cancelled")

    def _submit(self, start: int, stop: int) -> int:
        """Have the stages [start, stop) copied; return `stop`."""
        first = self.plan.stage_ends[start - 1] if start else 0
        size = self.plan.stage_ends[stop - 1] - first
        segment = (self._target + first, self._host.memory.address + first, size)
        with self._changed:
            if self._is_closed:
                raise CopyError("it was dropped meanwhile")
            ticket = self._copier.submit([segment], self._priority)
            self._traffic.watch("weights", ticket)
            self._parts.append(_Part(stop, first, ticket))
            self._changed.notify_all()
        return stop

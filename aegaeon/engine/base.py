"""The engine seam: executes actions on one device and owns the sequences' tokens and memory."""

from abc import ABC, abstractmethod

import msgspec

from aegaeon.types import ComputeAction, Load, Outcome, Request, RequestId


class EngineUsage(msgspec.Struct, frozen=True):
    """Bytes held now, against their budgets."""

    weight_bytes: int
    weight_budget_bytes: int
    kv_bytes: int
    kv_budget_bytes: int


class Engine(ABC):
    """One device's worker. `execute` and `load` may run at the same time, each on its own thread;
    the other verbs are called by the loop. Errors of a request or a model come back in the outcome;
    only a broken engine raises."""

    @abstractmethod
    def submit(self, request: Request) -> None:
        """Make the sequence known. Raises InvalidRequest, ContextLengthExceeded, OutOfBlocks (would
        not fit even alone)."""

    @abstractmethod
    def release(self, request: RequestId) -> None:
        """Forget the sequence and free its KV; unknown ids are ignored. Never called for a request
        that is part of a running action."""

    @abstractmethod
    def execute(self, action: ComputeAction) -> Outcome:
        """Do a Switch, Prefill or Decode and say how it went; blocks."""

    @abstractmethod
    def load(self, action: Load) -> Outcome:
        """Evict and load weights; blocks. Never evicts the current model."""

    @abstractmethod
    def usage(self) -> EngineUsage:
        """Return the bytes held now."""

    @abstractmethod
    def close(self) -> None:
        """Free everything. Idempotent."""

"""The seam behind which a device's weights are brought in, used and dropped.

in_place.py computes on the node's cache itself; staged.py copies from there to a device's arena.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

import msgspec
from torch import Tensor

from aegaeon.device.base import StepBatch
from aegaeon.models.weights import PackedWeights
from aegaeon.types import ModelId


class ResidentModel(Protocol):
    """What is asked of a model whose weights are at hand. `identity` names all that its keys and
    values depend on but the tokens: equal names, equal bits."""

    @property
    def identity(self) -> bytes: ...

    def forward(self, batch: StepBatch) -> Tensor:
        """Return logits [len(batch.logit_rows), vocab] float32."""


# What computes with a model's weights, wherever they lie.
Build = Callable[[ModelId, PackedWeights], ResidentModel]


class BroughtIn(msgspec.Struct, frozen=True):
    """A load's result: the model's bytes, and which models are here no longer because of it."""

    weight_bytes: int
    evicted: tuple[ModelId, ...] = ()


class Weights(ABC):
    """The models of one device. One thread brings in; one uses; neither waits for the other."""

    @abstractmethod
    def bring_in(self, model: ModelId, evict: Iterable[ModelId]) -> BroughtIn:
        """Make `model` usable, giving up `evict`, which nobody uses now.

        Returns when its first layers are in; a use waits for each later one. Raises CheckpointError
        and BudgetTooSmall, and then `model` is not here; LoadStalled, when it may be later.
        """

    @abstractmethod
    def await_rest(self, model: ModelId, may_begin: Callable[[], bool]) -> bool:
        """Return True when `model` is wholly in; False once `may_begin` says that nothing else
        would compute meanwhile. Raises CheckpointError; the next use tells of later failures."""

    @abstractmethod
    def use(self, model: ModelId) -> AbstractContextManager[ResidentModel]:
        """Return a context in which the model's weights stay where they are. Entering it raises
        WeightsEvicted when they are not here (any more)."""

    @abstractmethod
    def drop(self, model: ModelId) -> None:
        """Give up a model that nobody uses now; one that is not here is ignored."""

    @abstractmethod
    def set_demand(self, model: ModelId, is_wanted: bool) -> None:
        """Say whether requests for `model` wait or run here."""

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes of all models here."""

    @property
    @abstractmethod
    def budget_bytes(self) -> int:
        """The most that they may have."""

    @abstractmethod
    def close(self) -> None:
        """Give up everything. Idempotent."""

"""The weights an instance holds: loading and evicting whole models inside a byte budget."""

import ctypes
import logging
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from aegaeon.device.base import Device, StepBatch
from aegaeon.errors import BudgetTooSmall
from aegaeon.types import ModelId, ModelSpec

log = logging.getLogger(__name__)


class ResidentModel(Protocol):
    """What is asked of a loaded model."""

    @property
    def weight_bytes(self) -> int:
        """Bytes its weights take."""

    def forward(self, batch: StepBatch) -> Tensor:
        """Return logits [len(batch.logit_rows), vocab] float32."""


Loader = Callable[[str, Device], ResidentModel]


class Weights:
    """The resident models of one device. One thread loads and evicts; any may `get`."""

    def __init__(self, budget_bytes: int, device: Device, loader: Loader) -> None:
        self.budget_bytes = budget_bytes
        self._device = device
        self._loader = loader
        self._models: dict[ModelId, ResidentModel] = {}
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of all resident models."""
        return self._used_bytes

    def get(self, model: ModelId) -> ResidentModel | None:
        """Return the model if it is resident."""
        return self._models.get(model)

    def load(self, spec: ModelSpec) -> int:
        """Make `spec` resident and return its bytes. Raises BudgetTooSmall and the loader's errors.

        Room is taken before the first byte is read.
        """
        if spec.id in self._models:
            return self._models[spec.id].weight_bytes
        self._check(spec, spec.weight_bytes)
        model = self._loader(spec.path, self._device)
        return_free_memory()  # what converting tensors took
        self._check(spec, model.weight_bytes)
        self._models[spec.id] = model
        self._used_bytes += model.weight_bytes
        return model.weight_bytes

    def evict(self, model: ModelId) -> None:
        """Drop a model and hand its memory back to the system; one not resident is ignored."""
        evicted = self._models.pop(model, None)
        if evicted is not None:
            self._used_bytes -= evicted.weight_bytes
            del evicted
            return_free_memory()

    def clear(self) -> None:
        """Drop everything."""
        for model in list(self._models):
            self.evict(model)

    def _check(self, spec: ModelSpec, weight_bytes: int) -> None:
        if self._used_bytes + weight_bytes > self.budget_bytes:
            raise BudgetTooSmall(
                f"{spec.id} needs {weight_bytes} bytes of weights, {self._used_bytes} of "
                f"{self.budget_bytes} are taken; raise --model-cache-budget-gb"
            )


def return_free_memory() -> None:
    """Give freed heap pages back to the system; glibc keeps those below its mmap threshold."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries have none
        trim(0)

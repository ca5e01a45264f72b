"""What lets models come to an engine that is open, and go again."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aegaeon.config import Settings
from aegaeon.engine.shared import DTYPES, CheckModel, check_capacity, check_types, kv_shapes
from aegaeon.errors import BudgetTooSmall
from aegaeon.memory.budget import Budgets, check_budgets, check_device
from aegaeon.memory.kv import KvPool, KvShape
from aegaeon.memory.source import WeightSource
from aegaeon.types import ModelId, ModelSpec


@dataclass(frozen=True, slots=True)
class Shelf:
    """The weights of models that an engine may open; `pools` are those that hold its KV, on the
    host and on the device. Their slabs are cut: whose blocks do not fit is refused."""

    settings: Settings
    budgets: Budgets
    source: WeightSource
    pools: Sequence[KvPool]
    check: CheckModel

    def put(self, spec: ModelSpec) -> KvShape:
        """Make `spec` known and return what a token of it keeps. Raises BudgetTooSmall,
        ConfigError, UnsupportedModel, CheckpointError."""
        self.check(self.settings, (spec,))
        check_budgets(self.budgets, (spec,))
        if self.settings.has_own_memory:
            check_device(self.budgets.device_bytes, self.budgets.device_kv_bytes, (spec,))
        shapes = kv_shapes((spec,), self._dtype)
        check_types((spec,), shapes, self.settings)
        shape = shapes[spec.id]
        for pool in self.pools:
            if not pool.knows(shape):
                raise BudgetTooSmall(
                    f"a block of {spec.id} takes {shape.block_bytes} bytes of keys and values "
                    f"({shape.layers} layers of {shape.kv_heads} heads of {shape.head_dim}); slabs "
                    f"of {pool.slab_bytes} bytes were not cut for such: start the server with it "
                    "among its models, or in --models-dir"
                )
            check_capacity(pool, (spec,), shapes)
        self.source.put(spec)
        return shape

    def take(self, model: ModelId) -> None:
        """Forget a model that is not open any more."""
        self.source.take(model)

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self.settings.stored_kv]

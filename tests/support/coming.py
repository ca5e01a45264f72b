"""A packed model whose stages come in only when they are awaited."""

from contextlib import contextmanager

import torch

from aegaeon.models.packing import PackPlan
from aegaeon.models.weights import PackedWeights, read_weights


class Coming:
    """The stages of `weights`, whose memory is NaN where none is in. `awaited` are in."""

    def __init__(self, plan: PackPlan) -> None:
        self.plan = plan
        self.whole = read_weights(plan)
        self.awaited: list[int] = []
        self.is_cached = False  # in the node's copy all is in
        self._buffer = bytearray(b"\xff" * (plan.total_bytes + 64))
        start = -torch.frombuffer(self._buffer, dtype=torch.uint8).data_ptr() % 64
        self._memory = memoryview(self._buffer)[start : start + plan.total_bytes]
        self.weights = PackedWeights(self._memory, plan, self)

    def await_stage(self, stage: int) -> None:
        self.awaited.append(stage)
        first = self.plan.stage_ends[stage - 1] if stage else 0
        end = self.plan.stage_ends[stage]
        self.weights.memory[first:end] = self.whole.memory[first:end]

    def is_in(self, stage: int) -> bool:
        return stage in self.awaited

    @contextmanager
    def cached(self, stage: int):
        yield self.whole.memory.numpy().data if self.is_cached else None

"""Records a model's step: operators that compute nothing and note who makes what from what."""

from typing import Generic, TypeVar

import torch
from torch import Tensor

from aegaeon import _native
from aegaeon.device.base import Operators, Projection, Step, StepBatch, StepInputs
from aegaeon.memory.kv import BLOCK_TOKENS, KvShape, KvView

# Of every tensor while a step is recorded; the plan runs for any.
RECORDED_ROWS = 2

Columns = tuple[int, int, int]  # slot, first column, columns


# By name: a build without CUDA has no CudaStepPlan.
Plan = TypeVar("Plan", bound="_native.StepPlan | _native.CudaStepPlan")


class RecordedStep(Generic[Plan]):
    """A native plan of a step; keeps the weights that it computes with where they are."""

    def __init__(self, plan: Plan, result_features: int, weights: list[object]) -> None:
        self.plan = plan
        self.result_features = result_features
        self.weights = weights  # vectors, and projections in the order of their products


def record(step: Step, hidden: int, head_dim: int, plan: Plan) -> RecordedStep[Plan]:
    """Return `step`, recorded into the new `plan` for inputs of these widths. No weight is read.

    Raises ValueError where the plan cannot have operands as the step gives them.
    """
    recorder = Recorder(plan)
    result = step(recorder, recorder.inputs_of(hidden, head_dim), recorder.need_stage)
    plan.finish(recorder.slot_of(result))
    return RecordedStep(plan, result.shape[1], recorder.weights)


class Recorder(Operators):
    """Each result is a tensor of RECORDED_ROWS rows that nobody writes to: a slot of the plan is
    known again by the memory that its views share. The batch is that of a run, not of now."""

    def __init__(self, plan: "_native.StepPlan | _native.CudaStepPlan") -> None:
        self.plan = plan
        self.weights: list[object] = []
        self._slots: dict[int, tuple[int, int]] = {}  # and their columns, by address
        self._made: list[Tensor] = []  # so that no address comes twice

    def inputs_of(self, hidden: int, head_dim: int) -> StepInputs:
        """Return inputs of the step: x, cos and sin, in the order in which the plan has them."""
        widths = hidden, head_dim, head_dim
        x, cos, sin = (self._tensor(self.plan.input(width), width) for width in widths)
        rows = torch.arange(RECORDED_ROWS)
        nothing = KvView(KvShape(1, 1, 1), torch.empty(0, BLOCK_TOKENS, 1), ())
        return StepInputs(x, cos, sin, StepBatch(rows, rows, rows, nothing))

    def need_stage(self, stage: int) -> None:
        """What follows needs this stage of the weights, and those before it."""
        self.plan.need_stages(stage + 1)

    def slot_of(self, x: Tensor) -> int:
        """Return the slot that x is a view of."""
        return self._home_of(x)[0]

    def linear(self, x: Tensor, projection: Projection, residual: Tensor | None = None) -> Tensor:
        assert x.shape[1] == projection.in_features
        self.weights.append(projection)
        added = None if residual is None else self._columns(residual)
        slot = self.plan.linear(self._columns(x), projection.operands, added)
        return self._tensor(slot, projection.out_features)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
        self.weights.append(weight)
        columns, address = self._columns(x), weight.data_ptr()
        if rows is not None:
            slot = self.plan.rms_norm_outputs(columns, address, eps)
        else:
            slot = self.plan.rms_norm(columns, columns[2] // len(weight), address, eps)
        return self._tensor(slot, *x.shape[1:])

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        angles = self._columns(cos), self._columns(sin)
        slot = self.plan.rotate(self._columns(x), x.shape[1], *angles)
        return self._tensor(slot, *x.shape[1:])

    def gated(self, x: Tensor, projection: Projection) -> Tensor:
        assert x.shape[1] == projection.in_features
        self.weights.append(projection)
        slot = self.plan.gated(self._columns(x), projection.operands)
        return self._tensor(slot, projection.out_features // 2)

    def append_kv(
        self,
        layer: int,
        keys: Tensor,
        values: Tensor,
        batch: StepBatch,  # noqa: ARG002
    ) -> None:
        self.plan.append_kv(layer, keys.shape[1], self._columns(keys), self._columns(values))

    def attend(
        self,
        layer: int,
        queries: Tensor,
        batch: StepBatch,  # noqa: ARG002
        scale: float,
    ) -> Tensor:
        heads, head_dim = queries.shape[1:]
        slot = self.plan.attend(layer, heads, self._columns(queries), scale)
        return self._tensor(slot, heads * head_dim)

    def _tensor(self, slot: int, *shape: int) -> Tensor:
        made = torch.empty((RECORDED_ROWS, *shape))
        self._slots[made.data_ptr()] = slot, made.stride(0)
        self._made.append(made)
        return made

    def _home_of(self, x: Tensor) -> tuple[int, int]:
        """Return the slot that x is a view of, and the slot's columns."""
        home = self._slots.get(x.data_ptr() - int(x.storage_offset()) * x.element_size())
        assert home is not None, "a step computes with its device's operators only"
        return home

    def _columns(self, x: Tensor) -> Columns:
        """Return where x, [rows, ...], lies: columns side by side of a slot, in all its rows."""
        slot, columns = self._home_of(x)
        strides, first, width = x.stride(), int(x.storage_offset()), 1
        is_side_by_side = len(x) == RECORDED_ROWS and strides[0] == columns
        for size, stride in zip(reversed(x.shape[1:]), reversed(strides[1:]), strict=True):
            is_side_by_side &= stride == width
            width *= size
        assert is_side_by_side and first + width <= columns, "a step cuts columns, not rows"
        return slot, first, width

"""The CPU as a device: native operators in place on packed weights and KV pages; activations are
float32.

The operators are native (csrc/ops); what torch does here only allocates and shapes.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from aegaeon import _native
from aegaeon.device.attention import AttentionPlan
from aegaeon.device.base import (
    AwaitStage,
    Change,
    DirectDevice,
    DirectRunner,
    Draw,
    Projection,
    RowLogProbs,
    Step,
    StepBatch,
    StepInputs,
    StepRunner,
)
from aegaeon.device.draws import log_probabilities_on_host, sample_on_host
from aegaeon.device.packed import Matrix
from aegaeon.device.recorder import RecordedStep, record


class CpuDevice(DirectDevice):
    """Computes on `threads` threads, the caller's among them; one step at a time, others wait.

    A model's step is recorded before its first run and native from then on. All models' steps share
    one workspace.
    """

    name = "cpu"

    def __init__(
        self,
        threads: int = 1,
        activation_dtype: torch.dtype = torch.float32,
        neighbours: str = "",
        seat: int = 0,
    ) -> None:
        """Those who meet at the path `neighbours`, each at a seat, share their threads out among
        those that compute. Raises RegionError, RegionMismatch, RuntimeError for too many threads.
        """
        self.activation_dtype = activation_dtype
        self._pool = _native.ThreadPool(threads, neighbours, seat)
        self._plan: AttentionPlan | None = None
        self._workspace = _native.Workspace()
        self._turn = threading.Lock()

    def new_runner(self) -> StepRunner:
        return _Replay(self)

    @contextmanager
    def turn(self) -> Iterator[tuple[_native.ThreadPool, _native.Workspace]]:
        """Have the threads and the workspace to oneself."""
        with self._turn:
            yield self._pool, self._workspace

    def embed(self, token_ids: Tensor, table: Matrix) -> Tensor:
        token_ids = token_ids.contiguous()
        shape = (len(token_ids), table.in_features)
        out = torch.empty(shape)
        _native.embed(self._pool, token_ids.data_ptr(), shape, table.operand, out.data_ptr())
        return out

    def linear(self, x: Tensor, projection: Projection, residual: Tensor | None = None) -> Tensor:
        x = x.contiguous()
        out = torch.empty((len(x), projection.out_features))
        shape = (len(x), projection.in_features)
        added = 0
        if residual is not None:
            residual = residual.contiguous()
            added = residual.data_ptr()
        _native.linear(self._pool, x.data_ptr(), shape, projection.operands, out.data_ptr(), added)
        return out

    def gated(self, x: Tensor, projection: Projection) -> Tensor:
        x = x.contiguous()
        out = torch.empty((len(x), projection.out_features // 2))
        shape = (len(x), projection.in_features)
        _native.gated(self._pool, x.data_ptr(), shape, projection.operands, out.data_ptr())
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
        x = _in_rows(x if rows is None else x[rows])
        out = torch.empty(x.shape)
        heads = x.shape[1] if x.dim() > 2 else 1
        shape = (len(x), heads, x.shape[-1])
        _native.rms_norm(self._pool, _operand(x), shape, weight.data_ptr(), eps, out.data_ptr())
        return out

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x, cos, sin = _in_rows(x), cos.contiguous(), sin.contiguous()
        rows, heads, head_dim = x.shape
        out = torch.empty((rows, heads, head_dim))
        angles = (cos.data_ptr(), sin.data_ptr())
        _native.rotate(self._pool, _operand(x), (rows, heads, head_dim), angles, out.data_ptr())
        return out

    def append_kv(self, layer: int, keys: Tensor, values: Tensor, batch: StepBatch) -> None:
        keys, values = _in_rows(keys), _in_rows(values)
        rows = self._plan_for(batch).rows
        operands = _operand(keys), _operand(values)
        _native.append_kv(self._pool, rows, layer, len(keys), *operands)

    def attend(self, layer: int, queries: Tensor, batch: StepBatch, scale: float) -> Tensor:
        queries = queries.contiguous()
        rows, heads, head_dim = queries.shape
        out = torch.empty((rows, heads * head_dim))
        operand = (queries.data_ptr(), rows, heads)
        plan = self._plan_for(batch)
        _native.attend(self._pool, plan.rows, layer, operand, scale, out.data_ptr())
        return out

    def sample(
        self, logits: Tensor, draws: Sequence[Draw], changes: Sequence[Change | None] = ()
    ) -> list[int | None]:
        return sample_on_host(self._pool, logits, draws, changes)

    def log_probabilities(
        self, logits: Tensor, chosen: Sequence[int], best: int
    ) -> list[RowLogProbs]:
        return log_probabilities_on_host(self._pool, logits, chosen, best)

    def _plan_for(self, batch: StepBatch) -> AttentionPlan:
        if self._plan is None or self._plan.kv is not batch.kv:
            self._plan = AttentionPlan(batch.kv)
        return self._plan


class _Replay(DirectRunner):
    def __init__(self, device: CpuDevice) -> None:
        super().__init__(device)
        self._turn = device.turn
        self._recorded: RecordedStep[_native.StepPlan] | None = None
        self._stages = 0  # that are in, from the first on; none goes while the model is here

    def prepare(self, step: Step, hidden: int, head_dim: int) -> None:
        self._recorded = record(step, hidden, head_dim, _native.StepPlan())

    def run(self, step: Step, inputs: StepInputs, await_stage: AwaitStage) -> Tensor:
        if self._recorded is None:
            self.prepare(step, inputs.x.shape[1], inputs.cos.shape[1])
        assert self._recorded is not None
        recorded, batch = self._recorded, inputs.batch
        x, cos, sin = inputs.x.contiguous(), inputs.cos.contiguous(), inputs.sin.contiguous()
        wanted = batch.logit_rows.contiguous()
        result = torch.empty((len(wanted), recorded.result_features))
        given = (
            len(x),
            (x.data_ptr(), cos.data_ptr(), sin.data_ptr()),
            (len(wanted), wanted.data_ptr()),
            result.data_ptr(),
        )
        kv, plan = AttentionPlan(batch.kv), recorded.plan
        at = 0
        with self._turn() as (pool, workspace):
            while True:
                at = plan.run(pool, workspace, kv.rows, given, (at, self._stages))
                if at == plan.operators:
                    return result
                needed = plan.stages_of(at)
                await_stage(needed - 1)
                self._stages = needed


def _in_rows(x: Tensor) -> Tensor:
    """Return x [rows, ...], copied unless each row lies in one piece."""
    strides = x.stride()
    is_whole = strides[-1] == 1 and (x.dim() == 2 or strides[1] == x.shape[2])
    return x if is_whole else x.contiguous()


def _operand(x: Tensor) -> tuple[int, int]:
    """Return address and row stride of what `_in_rows` returned."""
    return x.data_ptr(), x.stride(0)

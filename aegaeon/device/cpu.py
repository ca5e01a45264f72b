"""The CPU as a device: native operators in place on packed weights and KV pages, in float32.

The operators are native (csrc/ops); what torch does here only allocates and shapes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from aegaeon import _native
from aegaeon.device.attention import AttentionPlan
from aegaeon.device.base import Device, Draw, Projection, StepBatch
from aegaeon.device.packed import Matrix

SEED_MASK = (1 << 64) - 1


class CpuDevice(Device):
    """Computes on `threads` threads, the caller's among them; one forward pass at a time."""

    name = "cpu"
    dtype = torch.float32

    def __init__(self, threads: int = 1) -> None:
        self._pool = _native.ThreadPool(threads)
        self._plan: AttentionPlan | None = None

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

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        features = x.shape[-1]
        shape = (x.numel() // features, features)
        _native.rms_norm(self._pool, x.data_ptr(), shape, weight.data_ptr(), eps, out.data_ptr())
        return out

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x, cos, sin = _in_rows(x), cos.contiguous(), sin.contiguous()
        rows, heads, head_dim = x.shape
        out = torch.empty((rows, heads, head_dim))
        angles = (cos.data_ptr(), sin.data_ptr())
        _native.rotate(self._pool, _operand(x), (rows, heads, head_dim), angles, out.data_ptr())
        return out

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = _in_rows(gate), _in_rows(up)
        out = torch.empty(gate.shape)
        shape = (gate.shape[0], gate.shape[1])
        _native.silu_mul(self._pool, _operand(gate), _operand(up), shape, out.data_ptr())
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

    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
        logits = logits.contiguous()
        rows = [
            (*(params.temperature, max(params.top_k, 0), params.top_p, params.min_p),
             *(params.seed & SEED_MASK, position))
            for params, position in draws
        ]  # fmt: skip
        shape = (logits.shape[0], logits.shape[1])
        return _native.sample(self._pool, logits.data_ptr(), shape, rows)

    def _plan_for(self, batch: StepBatch) -> AttentionPlan:
        if self._plan is None or self._plan.kv is not batch.kv:
            self._plan = AttentionPlan(batch.kv)
        return self._plan


def _in_rows(x: Tensor) -> Tensor:
    """Return x [rows, ...], copied unless each row lies in one piece."""
    strides = x.stride()
    is_whole = strides[-1] == 1 and (x.dim() == 2 or strides[1] == x.shape[2])
    return x if is_whole else x.contiguous()


def _operand(x: Tensor) -> tuple[int, int]:
    """Return address and row stride of what `_in_rows` returned."""
    return x.data_ptr(), x.stride(0)

"""The CPU as a device: native products in place on packed weights, else plain torch operators.

Elementwise formulas use only operators whose vector and tail loops agree (exp, and the exactly
rounded + - * / sqrt); silu and sigmoid of torch do not.
"""

import torch
from torch import Tensor

from aegaeon import _native
from aegaeon.device.attention import AttentionPlan
from aegaeon.device.base import Device, Projection, StepBatch
from aegaeon.device.packed import Matrix


class CpuDevice(Device):
    """Computes on `threads` threads, the caller's among them; one forward pass at a time.

    torch's operators use the calling thread's torch threads instead, never at the same time.
    """

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

    def linear(self, x: Tensor, projection: Projection) -> Tensor:
        x = x.contiguous()
        out = torch.empty((len(x), projection.out_features))
        shape = (len(x), projection.in_features)
        _native.linear(self._pool, x.data_ptr(), shape, projection.operands, out.data_ptr())
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        mean_square = (x * x).sum(-1, keepdim=True).div_(x.shape[-1])
        return (x / mean_square.add_(eps).sqrt_()).mul_(weight)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return (x * cos[:, None]).add_(turned.mul_(sin[:, None]))

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return (gate / gate.neg().exp_().add_(1.0)).mul_(up)

    def append_kv(self, layer: int, keys: Tensor, values: Tensor, batch: StepBatch) -> None:
        self._plan_for(batch).append(layer, keys, values)

    def attend(self, layer: int, queries: Tensor, batch: StepBatch, scale: float) -> Tensor:
        return self._plan_for(batch).attend(layer, queries, scale).flatten(1)

    def _plan_for(self, batch: StepBatch) -> AttentionPlan:
        if self._plan is None or self._plan.kv is not batch.kv:
            self._plan = AttentionPlan(batch.kv)
        return self._plan

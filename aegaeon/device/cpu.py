"""The CPU as a device: plain torch operators in float32, row by row the same bits.

Elementwise formulas use only operators whose vector and tail loops agree (exp, and the exactly
rounded + - * / sqrt); silu and sigmoid of torch do not.
"""

import torch
from torch import Tensor

from aegaeon.device.attention import AttentionPlan
from aegaeon.device.base import Device, StepBatch
from aegaeon.device.products import RowIndependentLinear, pack


class CpuDevice(Device):
    """Computes on the calling thread's torch threads; one forward pass at a time."""

    name = "cpu"
    dtype = torch.float32

    def __init__(self) -> None:
        self._linear = RowIndependentLinear()
        self._plan: AttentionPlan | None = None

    def place(self, weight: Tensor, for_products: bool = False) -> Tensor:
        weight = weight.detach().to(self.dtype).contiguous()
        return pack(weight) if for_products else weight

    def embed(self, token_ids: Tensor, table: Tensor) -> Tensor:
        return table.index_select(0, token_ids)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self._linear(x.contiguous(), weight)
        return y if bias is None else y + bias

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

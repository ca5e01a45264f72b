"""The device seam in a few plain lines: every sequence's keys and values in growing tensors."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional

from aegaeon.device.base import (
    Change,
    DirectDevice,
    Draw,
    Projection,
    RowLogProbs,
    StepBatch,
)
from aegaeon.device.packed import Matrix, unpack
from tests.support.sampling import pick_token


class DenseDevice(DirectDevice):
    """One sequence only; row order is position order. The reference for models and devices."""

    name = "dense"

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}  # layer -> [tokens, kv_heads, head_dim]
        self.values: dict[int, Tensor] = {}

    def embed(self, token_ids: Tensor, table: Matrix) -> Tensor:
        return unpack(table).float()[token_ids]

    def linear(self, x: Tensor, projection: Projection, residual: Tensor | None = None) -> Tensor:
        weight = torch.cat([unpack(part).float() for part in projection.parts])
        bias = torch.cat(projection.biases) if projection.biases else None
        sums = functional.linear(x, weight, bias)
        return sums if residual is None else sums + residual

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
        x = x if rows is None else x[rows]
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]

    def gated(self, x: Tensor, projection: Projection) -> Tensor:
        gate, up = self.linear(x, projection).chunk(2, dim=-1)
        return functional.silu(gate) * up

    def append_kv(self, layer: int, keys: Tensor, values: Tensor, batch: StepBatch) -> None:
        past_keys, past_values = self.keys.get(layer, keys[:0]), self.values.get(layer, values[:0])
        assert len(past_keys) == int(batch.positions[0])
        self.keys[layer] = torch.cat((past_keys, keys))
        self.values[layer] = torch.cat((past_values, values))

    def attend(self, layer: int, queries: Tensor, batch: StepBatch, scale: float) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        group = queries.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        future = torch.arange(len(keys))[None, :] > batch.positions[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values).reshape(len(queries), -1)

    def sample(
        self, logits: Tensor, draws: Sequence[Draw], changes: Sequence[Change | None] = ()
    ) -> list[int | None]:
        assert not any(changes), "the references of changes are in tests.support.sampling"
        return [
            pick_token(row.numpy(), *draw) if row.isfinite().all() else None
            for row, draw in zip(logits, draws, strict=True)
        ]

    def log_probabilities(
        self, logits: Tensor, chosen: Sequence[int], best: int
    ) -> list[RowLogProbs]:
        values = logits.double().log_softmax(-1)
        likeliest = values.topk(best)
        rows = zip(values, chosen, likeliest.indices, likeliest.values, strict=True)
        return [
            (float(row[token]), list(zip(ids.tolist(), best_values.tolist(), strict=True)))
            for row, token, ids, best_values in rows
        ]


def dense_batch(token_ids: list[int], start: int = 0, every_row: bool = True) -> StepBatch:
    """Return a step of one sequence whose rows begin at position `start`."""
    rows = len(token_ids)
    return StepBatch(
        token_ids=torch.tensor(token_ids),
        positions=torch.arange(start, start + rows),
        logit_rows=torch.arange(rows) if every_row else torch.tensor([rows - 1]),
        kv=SimpleNamespace(),  # type: ignore[arg-type]  # this device keeps its own
    )

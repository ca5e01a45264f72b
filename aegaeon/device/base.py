"""The device seam: the operators a model's forward pass is made of.

Row i of every result depends on row i of the operands (and its own sequence's KV) alone, to the
bit: batch mates, padding and where a prompt was cut never show.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from aegaeon.memory.kv import KvView


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The rows of one forward pass of one model: each sequence's new tokens, one after another."""

    token_ids: Tensor  # [rows] int64
    positions: Tensor  # [rows] int64, 0-based within the sequence
    logit_rows: Tensor  # [outputs] int64, rows whose logits are wanted
    kv: KvView  # where these rows' keys and values go, and what each may look at


class Device(ABC):
    """Operators on float32 activations. `x` is [rows, features], row-major, unless said."""

    name: str
    dtype: torch.dtype

    @abstractmethod
    def place(self, weight: Tensor, for_products: bool = False) -> Tensor:
        """Return `weight` in the form this device computes with (dtype, memory).

        With `for_products` only `linear` reads it, so its memory order may be the device's own.
        """

    @abstractmethod
    def embed(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """Return rows of `table` [vocab, features]."""

    @abstractmethod
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias; weight is [out, in]."""

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension (any leading ones)."""

    @abstractmethod
    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate half-split pairs of x [rows, heads, head_dim] by cos, sin [rows, head_dim]."""

    @abstractmethod
    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) * up."""

    @abstractmethod
    def append_kv(self, layer: int, keys: Tensor, values: Tensor, batch: StepBatch) -> None:
        """Store the new rows' keys and values [rows, kv_heads, head_dim] in the batch's blocks."""

    @abstractmethod
    def attend(self, layer: int, queries: Tensor, batch: StepBatch, scale: float) -> Tensor:
        """Causal attention of queries [rows, heads, head_dim] over each row's own sequence up to
        and with its position; returns [rows, heads * head_dim]."""

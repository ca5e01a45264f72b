"""Rotary position embeddings: inverse frequencies of each kind, cosines and sines of a step.

The formulas are those of the papers (RoPE 2104.09864, YaRN 2309.00071) and Llama 3.1, evaluated in
float32 in the order in which transformers does, so that logits match it.
"""

import math

import torch
from torch import Tensor

from aegaeon.models.config import RopeConfig


class Rotary:
    """The angles of one model. Tables are made per step: a whole context would be megabytes."""

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim)  # [head_dim / 2] float32
        self._amplitude = amplitude(rope)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [rows, head_dim] float32 of positions [rows]."""
        angles = positions.to(torch.float32)[:, None] * self._frequencies
        cos, sin = angles.cos() * self._amplitude, angles.sin() * self._amplitude
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Return the angle per position of each pair of elements, [head_dim / 2] float32."""
    periods = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    match rope.kind:
        case "default":
            return 1.0 / periods
        case "linear":
            return 1.0 / periods / rope.factor
        case "llama3":
            return _llama3(rope, 1.0 / periods)
        case "yarn":
            return _yarn(rope, periods, head_dim)


def amplitude(rope: RopeConfig) -> float:
    """Return what cos and sin are multiplied with: yarn's attention factor, else 1."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_scale(rope.factor, rope.mscale) / _yarn_scale(rope.factor, rope.mscale_all_dim)
    return _yarn_scale(rope.factor, 1.0)


def _yarn_scale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    original = rope.original_context_tokens
    longest, shortest = original / rope.low_freq_factor, original / rope.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    span = rope.high_freq_factor - rope.low_freq_factor
    smooth = (original / wavelengths - rope.low_freq_factor) / span
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    scaled = torch.where(wavelengths > longest, frequencies / rope.factor, blended)
    return torch.where(wavelengths < shortest, frequencies, scaled)


def _yarn(rope: RopeConfig, periods: Tensor, head_dim: int) -> Tensor:
    """Pairs that turn often keep their frequency, slow ones are interpolated, a ramp between."""
    low = _yarn_dimension(rope, rope.beta_fast, head_dim)
    high = _yarn_dimension(rope, rope.beta_slow, head_dim)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as transformers does, or the ramp would divide by zero
    index = torch.arange(head_dim // 2, dtype=torch.float32)
    kept = 1 - torch.clamp((index - low) / (high - low), 0, 1)
    return 1.0 / (rope.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _yarn_dimension(rope: RopeConfig, rotations: float, head_dim: int) -> float:
    """Return the pair that turns `rotations` times over the original context."""
    turns = math.log(rope.original_context_tokens / (rotations * 2 * math.pi))
    return head_dim * turns / (2 * math.log(rope.theta))

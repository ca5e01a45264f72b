"""Operands drawn by seed, and products with one matrix."""

import torch
from torch import Tensor

from aegaeon.device.base import Projection
from aegaeon.device.cpu import CpuDevice
from aegaeon.device.packed import Matrix


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def multiply(x: Tensor, matrix: Matrix, threads: int = 1) -> Tensor:
    return CpuDevice(threads).linear(x, Projection((matrix,)))

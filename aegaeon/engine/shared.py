"""What the engines of a node share, as one engine joins it: the weight cache and the KV pool."""

from collections.abc import Mapping

import torch

from aegaeon import _native
from aegaeon._native import WeightCache
from aegaeon.config import Settings
from aegaeon.device.base import Device
from aegaeon.device.cpu import CpuDevice
from aegaeon.engine.regions import Regions
from aegaeon.errors import ConfigError
from aegaeon.memory.budget import READER_THREADS, Budgets
from aegaeon.memory.kv import KvPool, KvShape
from aegaeon.memory.source import WeightSource
from aegaeon.memory.traffic import Traffic
from aegaeon.memory.weights import Build
from aegaeon.models.config import read_config
from aegaeon.models.layers import Decoder
from aegaeon.models.weights import PackedWeights
from aegaeon.types import ModelId, ModelSpec

Shapes = Mapping[ModelId, KvShape]


def open_device(settings: Settings, budgets: Budgets) -> CpuDevice:
    """Return what computes. Raises ConfigError for instructions that this processor lacks."""
    try:
        _native.force_isa(settings.instruction_set)
    except ValueError as error:
        raise ConfigError(f"--instruction-set: {error}") from None
    return CpuDevice(budgets.threads)


def open_source(
    specs: tuple[ModelSpec, ...], budgets: Budgets, regions: Regions, traffic: Traffic
) -> WeightSource:
    """Join the node's weight cache. Raises RegionError, RegionMismatch."""
    cache = WeightCache.open_or_create(regions.weights, budgets.weight_bytes)
    return WeightSource(cache, specs, READER_THREADS, traffic)


def open_kv_pool(settings: Settings, budgets: Budgets, shapes: Shapes, regions: Regions) -> KvPool:
    """Join the node's pool, which has room for the share of each instance.

    Raises BudgetTooSmall, RegionError, RegionMismatch.
    """
    total_bytes = budgets.kv_bytes * settings.instance_count
    return KvPool(total_bytes, shapes.values(), regions.kv, budgets.kv_bytes)


def kv_shapes(specs: tuple[ModelSpec, ...], dtype: torch.dtype) -> dict[ModelId, KvShape]:
    """Return what a token of each model keeps. Raises what reading a config.json raises."""
    shapes = {}
    for spec in specs:
        config = read_config(spec.path)
        shapes[spec.id] = KvShape(config.layers, config.kv_heads, config.head_dim, dtype)
    return shapes


def decoders_on(device: Device) -> Build:
    """Return what makes a decoder of a model's weights, to compute on `device`."""

    def build(_: ModelId, weights: PackedWeights) -> Decoder:
        return Decoder(weights.plan.load_plan.config, device, weights)

    return build

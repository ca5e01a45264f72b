"""What every engine that computes is opened with: its device, and what the engines of a node share,
the weight cache and the KV pool."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from aegaeon import _native
from aegaeon._native import WeightCache
from aegaeon.config import Activations, Settings, StoredKv
from aegaeon.device.base import Device
from aegaeon.device.cpu import CpuDevice
from aegaeon.engine.regions import Regions
from aegaeon.errors import BudgetTooSmall, ConfigError
from aegaeon.memory.area import Locks, Pins
from aegaeon.memory.budget import READER_THREADS, Budgets, choose_budgets, least_tokens
from aegaeon.memory.host_model import Reading
from aegaeon.memory.kv import KvPool, KvShape, blocks_for
from aegaeon.memory.source import WeightSource
from aegaeon.memory.traffic import Traffic
from aegaeon.memory.weights import Build
from aegaeon.models.config import read_config
from aegaeon.models.layers import Decoder
from aegaeon.models.packing import Layout
from aegaeon.models.weights import PackedWeights
from aegaeon.types import ModelId, ModelSpec

# Raises what keeps the device from computing one of the models.
CheckModel = Callable[[Settings, tuple[ModelSpec, ...]], object]
Shapes = Mapping[ModelId, KvShape]

DTYPES: dict[StoredKv | Activations, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def open_cpu(settings: Settings, budgets: Budgets, regions: Regions) -> CpuDevice:
    """Return the CPU as what computes. Raises ConfigError for instructions that this processor
    lacks, and for more threads than the system gives.

    The device's threads are all that compute: torch, which only allocates and shapes, has none of
    its own from here on. Its workers would look for work for milliseconds after each operator.
    """
    torch.set_num_threads(1)
    try:
        _native.force_isa(settings.instruction_set)
    except ValueError as error:
        raise ConfigError(f"--instruction-set: {error}") from None
    try:
        dtype = DTYPES[settings.activations]
        return CpuDevice(budgets.threads, dtype, regions.neighbours, regions.seat)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot start {budgets.threads} compute threads ({error}); lower "
            "--threads-per-instance or raise the limit of processes (ulimit -u)"
        ) from None


@dataclass(frozen=True, slots=True)
class Parts:
    """What an engine is made of on any device; `traffic` is what the source counts."""

    budgets: Budgets
    device: Device
    shapes: dict[ModelId, KvShape]
    traffic: Traffic
    source: WeightSource
    pool: KvPool
    locks: Locks | None


@dataclass(frozen=True, slots=True)
class Compute:
    """What computes, and how the node's memory is to suit it: the layout of matrices, who locks
    what a device copies from, and what says which models it cannot compute."""

    open: Callable[[Settings, Budgets, Regions], Device] = open_cpu
    layout: Layout = "tiles"
    pins: Pins | None = None
    check: CheckModel = lambda *_: None


def open_parts(
    settings: Settings,
    specs: tuple[ModelSpec, ...],
    regions: Regions,
    owned: ExitStack,
    compute: Compute,
) -> Parts:
    """Open what an engine of `specs` needs; `owned` closes it. Raises BudgetTooSmall, ConfigError,
    RegionError, RegionMismatch, and what reading a config.json or opening the device raises."""
    budgets = choose_budgets(settings, specs)
    device = compute.open(settings, budgets, regions)
    shapes = kv_shapes(specs, DTYPES[settings.stored_kv])
    check_types(specs, shapes, settings)
    traffic = Traffic()
    cache = WeightCache.open_or_create(regions.weights, budgets.weight_bytes)
    locks = None if compute.pins is None else Locks(compute.pins)
    reading = Reading(READER_THREADS, traffic, locks)
    source = WeightSource(cache, specs, reading, compute.layout)
    owned.callback(source.close)
    pool = open_kv_pool(settings, budgets, shapes, regions)
    owned.callback(pool.close)
    check_capacity(pool, specs, shapes)
    return Parts(budgets, device, shapes, traffic, source, pool, locks)


def open_kv_pool(settings: Settings, budgets: Budgets, shapes: Shapes, regions: Regions) -> KvPool:
    """Join the node's pool, which has room for the share of each instance.

    Raises BudgetTooSmall, RegionError, RegionMismatch.
    """
    total_bytes = budgets.kv_bytes * settings.instance_count
    cut, spare = pool_shapes(settings, shapes, regions)
    return KvPool(total_bytes, cut, regions.kv, budgets.kv_bytes, spare=spare)


def pool_shapes(
    settings: Settings, shapes: Shapes, regions: Regions
) -> tuple[tuple[KvShape, ...], tuple[KvShape, ...]]:
    """Return the shapes for which pools are cut, and those that may come: the same for all engines
    of a node, whichever models it serves by now."""
    dtype = DTYPES[settings.stored_kv]
    cut, spare = (
        tuple(KvShape(*sizes, dtype) for sizes in kind)
        for kind in (regions.kv_shapes, regions.kv_spare)
    )
    return cut or tuple(shapes.values()), spare


def kv_shapes(specs: tuple[ModelSpec, ...], dtype: torch.dtype) -> dict[ModelId, KvShape]:
    """Return what a token of each model keeps. Raises what reading a config.json raises."""
    shapes = {}
    for spec in specs:
        config = read_config(spec.path)
        shapes[spec.id] = KvShape(config.layers, config.kv_heads, config.head_dim, dtype)
    return shapes


def check_types(
    specs: tuple[ModelSpec, ...], shapes: Mapping[ModelId, KvShape], settings: Settings
) -> None:
    """Raise ConfigError when a spec was made for keys and values of another type."""
    for spec in specs:
        if spec.kv_token_bytes != shapes[spec.id].token_bytes:
            raise ConfigError(
                f"{spec.id} was resolved for {spec.kv_token_bytes} bytes of keys and values a "
                f"token, with --kv-dtype {settings.kv_dtype} they are "
                f"{shapes[spec.id].token_bytes}; resolve it with the same setting"
            )


def check_capacity(
    pool: KvPool, specs: tuple[ModelSpec, ...], shapes: Mapping[ModelId, KvShape]
) -> None:
    """Raise BudgetTooSmall when the pool's slabs, of one size for all models, leave some model less
    than a sequence: the layout, which counts bytes, does not know of them."""
    for spec in specs:
        need, has = blocks_for(least_tokens(spec)), pool.capacity_blocks(shapes[spec.id])
        if has < need:
            raise BudgetTooSmall(
                f"{least_tokens(spec)} tokens of {spec.id} need {need} blocks of keys and values, "
                f"slabs of {pool.slab_bytes} bytes in {pool.budget_bytes} hold {has}; "
                "raise --kv-budget-gb"
            )


def decoders_on(device: Device) -> Build:
    """Return what makes a decoder of a model's weights, to compute on `device`."""

    def build(_: ModelId, weights: PackedWeights) -> Decoder:
        decoder = Decoder(weights.plan.load_plan.config, device, weights)
        decoder.prepare()
        return decoder

    return build

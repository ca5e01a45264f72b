"""Opens a ModelEngine that computes on the CPU, in place on what the node's processes share."""

from collections.abc import Mapping
from contextlib import ExitStack

from aegaeon._native import WeightCache
from aegaeon.config import Settings
from aegaeon.device.cpu import CpuDevice
from aegaeon.engine.engine import ModelEngine
from aegaeon.engine.kv_place import InPlaceKv
from aegaeon.engine.regions import Regions
from aegaeon.memory.budget import Budgets, choose_budgets
from aegaeon.memory.in_place import InPlaceWeights
from aegaeon.memory.kv import KvPool, KvShape
from aegaeon.memory.source import WeightSource
from aegaeon.models.config import read_config
from aegaeon.models.layers import Decoder
from aegaeon.models.weights import PackedWeights
from aegaeon.types import ModelId, ModelSpec

# Threads that read a model's files: enough to keep a fast disk busy, asleep most of the time.
READERS = 4


def open_cpu_engine(
    settings: Settings, specs: tuple[ModelSpec, ...], regions: Regions
) -> ModelEngine:
    """Return the engine. Raises BudgetTooSmall, RegionError, and what reading a config.json
    raises."""
    budgets = choose_budgets(settings, specs)
    device = CpuDevice(budgets.threads)

    def build(_: ModelId, weights: PackedWeights) -> Decoder:
        return Decoder(weights.plan.load_plan.config, device, weights)

    with ExitStack() as owned:
        cache = WeightCache.open_or_create(regions.weights, budgets.weight_bytes)
        owned.callback(cache.close)
        weights = InPlaceWeights(WeightSource(cache, specs, READERS), build)
        shapes = kv_shapes(specs, device)
        pool = open_kv_pool(settings, budgets, shapes, regions)
        engine = ModelEngine(specs, shapes, weights, InPlaceKv(pool), budgets.threads)
        owned.pop_all()
        return engine


def open_kv_pool(
    settings: Settings, budgets: Budgets, shapes: Mapping[ModelId, KvShape], regions: Regions
) -> KvPool:
    """Join the node's pool, which has room for the share of each instance."""
    total_bytes = budgets.kv_bytes * settings.instance_count
    return KvPool(total_bytes, shapes.values(), regions.kv, budgets.kv_bytes)


def kv_shapes(specs: tuple[ModelSpec, ...], device: CpuDevice) -> dict[ModelId, KvShape]:
    """Return what a token of each model keeps."""
    shapes = {}
    for spec in specs:
        config = read_config(spec.path)
        shapes[spec.id] = KvShape(config.layers, config.kv_heads, config.head_dim, device.dtype)
    return shapes

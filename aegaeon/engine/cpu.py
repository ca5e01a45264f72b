"""Opens a ModelEngine that computes on the CPU, in place on what the node's processes share."""

from contextlib import ExitStack

from aegaeon.config import Settings
from aegaeon.engine.engine import EngineMemory, ModelEngine
from aegaeon.engine.kv_place import InPlaceKv
from aegaeon.engine.regions import Regions
from aegaeon.engine.shared import (
    decoders_on,
    kv_shapes,
    open_device,
    open_kv_pool,
    open_source,
)
from aegaeon.memory.budget import choose_budgets
from aegaeon.memory.costs import SwapCosts
from aegaeon.memory.in_place import InPlaceWeights
from aegaeon.memory.traffic import Traffic
from aegaeon.types import ModelSpec


def open_cpu_engine(
    settings: Settings, specs: tuple[ModelSpec, ...], regions: Regions
) -> ModelEngine:
    """Return the engine. Raises BudgetTooSmall, RegionError, RegionMismatch, and what reading a
    config.json raises."""
    budgets = choose_budgets(settings, specs)
    device = open_device(settings, budgets)
    shapes = kv_shapes(specs, device.dtype)
    traffic = Traffic()
    with ExitStack() as owned:
        source = open_source(specs, budgets, regions, traffic)
        owned.callback(source.close)
        kv = InPlaceKv(open_kv_pool(settings, budgets, shapes, regions))
        owned.callback(kv.close)
        weights = InPlaceWeights(source, decoders_on(device))
        memory = EngineMemory(weights, kv, traffic, SwapCosts(traffic))
        engine = ModelEngine(specs, shapes, memory, budgets.threads)
        owned.pop_all()
        return engine

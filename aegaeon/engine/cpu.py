"""Opens a ModelEngine that computes on the CPU, in place on what the node's processes share."""

from contextlib import ExitStack

from aegaeon.config import Settings
from aegaeon.engine.engine import ModelEngine
from aegaeon.engine.kv_place import InPlaceKv
from aegaeon.engine.memory import EngineMemory
from aegaeon.engine.regions import Regions
from aegaeon.engine.shared import Compute, decoders_on, open_parts
from aegaeon.engine.shelf import Shelf
from aegaeon.memory.costs import SwapCosts
from aegaeon.memory.in_place import InPlaceWeights
from aegaeon.types import ModelSpec

# Keys and values that steps may come to need while the system gives more.
AHEAD_BYTES = 64 << 20


def open_cpu_engine(
    settings: Settings, specs: tuple[ModelSpec, ...], regions: Regions
) -> ModelEngine:
    """Return the engine. Raises what `open_parts` raises."""
    with ExitStack() as owned:
        compute = Compute()
        parts = open_parts(settings, specs, regions, owned, compute)
        weights = InPlaceWeights(parts.source, decoders_on(parts.device))
        costs = SwapCosts(parts.traffic)
        parts.pool.back_ahead(AHEAD_BYTES)
        shelf = Shelf(settings, parts.budgets, parts.source, (parts.pool,), compute.check)
        evictions = parts.source.evictions
        kv = InPlaceKv(parts.pool, settings.prefix_cache)
        memory = EngineMemory(weights, kv, parts.traffic, costs, shelf, evictions)
        engine = ModelEngine(specs, parts.shapes, memory, parts.device)
        owned.pop_all()
        return engine

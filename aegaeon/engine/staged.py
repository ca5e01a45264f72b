"""Opens a ModelEngine on a staged device: memory of its own, here in the host's, behind a link.

It computes as the CPU does, so that all that a device with memory of its own needs (copies of
weights and KV, in and out, beside compute) runs and is measured on any machine.
"""

from contextlib import ExitStack

from aegaeon._native import CopyEngine
from aegaeon.config import Settings
from aegaeon.engine.engine import EngineMemory, ModelEngine
from aegaeon.engine.kv_swap import SwappedKv
from aegaeon.engine.regions import Regions
from aegaeon.engine.shared import check_capacity, decoders_on, open_parts
from aegaeon.memory.arena import Arena
from aegaeon.memory.budget import COPY_CHUNK_BYTES, COPY_THREADS, GB
from aegaeon.memory.costs import SwapCosts
from aegaeon.memory.kv import KvPool
from aegaeon.memory.staged import StagedWeights
from aegaeon.types import ModelSpec

# What a turn's end may have go out while the system gives more.
AHEAD_BYTES = 256 << 20


def open_staged_engine(
    settings: Settings, specs: tuple[ModelSpec, ...], regions: Regions
) -> ModelEngine:
    """Return the engine. Raises CopyError, and what `open_parts` raises."""
    with ExitStack() as owned:
        parts = open_parts(settings, specs, regions, owned)
        budgets, traffic = parts.budgets, parts.traffic
        link_bytes_per_s = int(settings.link_gb_per_s * GB)
        copier = CopyEngine(COPY_THREADS, COPY_CHUNK_BYTES, link_bytes_per_s)
        owned.callback(copier.close)
        costs = SwapCosts(traffic)
        pool = KvPool(budgets.device_kv_bytes, parts.shapes.values())
        check_capacity(pool, specs, parts.shapes)
        parts.pool.back_ahead(AHEAD_BYTES)
        kv = SwappedKv(pool, parts.pool, copier, traffic, costs)
        arena = Arena(budgets.device_weight_bytes)
        build = decoders_on(parts.device)
        weights = StagedWeights(parts.source, arena, copier, build, traffic)
        memory = EngineMemory(weights, kv, traffic, costs)
        engine = ModelEngine(specs, parts.shapes, memory, parts.device)
        owned.pop_all()
        return engine

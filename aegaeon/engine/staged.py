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
from aegaeon.engine.shared import (
    decoders_on,
    kv_shapes,
    open_device,
    open_kv_pool,
    open_source,
)
from aegaeon.memory.arena import Arena
from aegaeon.memory.budget import COPY_CHUNK_BYTES, COPY_THREADS, GB, choose_budgets
from aegaeon.memory.costs import SwapCosts
from aegaeon.memory.kv import KvPool
from aegaeon.memory.staged import StagedWeights
from aegaeon.memory.traffic import Traffic
from aegaeon.types import ModelSpec


def open_staged_engine(
    settings: Settings, specs: tuple[ModelSpec, ...], regions: Regions
) -> ModelEngine:
    """Return the engine. Raises BudgetTooSmall, RegionError, RegionMismatch, CopyError, and what
    reading a config.json raises."""
    budgets = choose_budgets(settings, specs)
    device = open_device(settings, budgets)
    shapes = kv_shapes(specs, device.dtype)
    traffic = Traffic()
    with ExitStack() as owned:
        source = open_source(specs, budgets, regions, traffic)
        owned.callback(source.close)
        host = open_kv_pool(settings, budgets, shapes, regions)
        owned.callback(host.close)
        link_bytes_per_s = int(settings.link_gb_per_s * GB)
        copier = CopyEngine(COPY_THREADS, COPY_CHUNK_BYTES, link_bytes_per_s)
        owned.callback(copier.close)
        costs = SwapCosts(traffic)
        pool = KvPool(budgets.device_kv_bytes, shapes.values())
        kv = SwappedKv(pool, host, copier, traffic, costs)
        arena = Arena(budgets.device_weight_bytes)
        weights = StagedWeights(source, arena, copier, decoders_on(device), traffic)
        memory = EngineMemory(weights, kv, traffic, costs)
        engine = ModelEngine(specs, shapes, memory, budgets.threads)
        owned.pop_all()
        return engine

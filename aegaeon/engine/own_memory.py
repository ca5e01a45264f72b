"""Opens a ModelEngine on a device with memory of its own, behind a link: what they all share."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from aegaeon._native import CopyEngine
from aegaeon.config import Settings
from aegaeon.engine.engine import ModelEngine
from aegaeon.engine.kv_lending import Lending
from aegaeon.engine.kv_peers import Peers
from aegaeon.engine.kv_swap import SwappedKv
from aegaeon.engine.memory import EngineMemory
from aegaeon.engine.regions import Regions
from aegaeon.engine.shared import Compute, check_capacity, decoders_on, open_parts, pool_shapes
from aegaeon.engine.shelf import Shelf
from aegaeon.memory.area import Area
from aegaeon.memory.arena import ALIGNMENT, Arena
from aegaeon.memory.budget import Budgets
from aegaeon.memory.costs import SwapCosts
from aegaeon.memory.kv import KvPool, KvShape
from aegaeon.memory.staged import StagedWeights
from aegaeon.types import ModelSpec

# What a turn's end may have go out while the system gives more.
AHEAD_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class OwnMemory:
    """A device: its one allocation of so many bytes (None: memory of this host), its link, what
    computes on it, and how other processes reach what was allocated (None: not at all)."""

    allocate: Callable[[int], Area | None]
    open_link: Callable[[], CopyEngine]
    compute: Compute = field(default_factory=Compute)
    open_peers: Callable[[], Peers | None] = lambda: None


def open_on(
    device: OwnMemory, settings: Settings, specs: tuple[ModelSpec, ...], regions: Regions
) -> ModelEngine:
    """Return an engine of `specs` on `device`. Raises CopyError, and what `open_parts` and the
    device raise."""
    with ExitStack() as owned:
        parts = open_parts(settings, specs, regions, owned, device.compute)
        budgets, traffic = parts.budgets, parts.traffic
        copier = device.open_link()
        owned.callback(copier.close)
        pool, arena = _lay_out(device, budgets, pool_shapes(settings, parts.shapes, regions))
        owned.callback(pool.close)
        check_capacity(pool, specs, parts.shapes)
        if parts.locks is None or not parts.pool.pin(parts.locks):
            parts.pool.back_ahead(AHEAD_BYTES)
        costs = SwapCosts(traffic)
        peers = device.open_peers()
        lending = None
        if peers is not None:
            lending = Lending(pool, parts.pool, copier, traffic, peers)
        pools = (pool, parts.pool)
        kv = SwappedKv(pools, copier, traffic, costs, settings.prefix_cache, lending)
        build = decoders_on(parts.device)
        weights = StagedWeights(parts.source, arena, copier, build, traffic)
        shelf = Shelf(settings, budgets, parts.source, pools, device.compute.check)
        held = EngineMemory(weights, kv, traffic, costs, shelf, parts.source.evictions)
        engine = ModelEngine(specs, parts.shapes, held, parts.device)
        owned.pop_all()
        return engine


def _lay_out(
    device: OwnMemory,
    budgets: Budgets,
    shapes: tuple[tuple[KvShape, ...], tuple[KvShape, ...]],
) -> tuple[KvPool, Arena]:
    """Return the device's pool of keys and values, and its arena: one behind the other."""
    kv_bytes = -(-budgets.device_kv_bytes // ALIGNMENT) * ALIGNMENT
    cut, spare = shapes
    memory = device.allocate(kv_bytes + budgets.device_weight_bytes)
    if memory is None:
        pool = KvPool(budgets.device_kv_bytes, cut, spare=spare)
        return pool, Arena(budgets.device_weight_bytes)
    area = memory.cut(0, kv_bytes)
    pool = KvPool(budgets.device_kv_bytes, cut, area=area, spare=spare)
    weights = memory.cut(kv_bytes, budgets.device_weight_bytes)
    return pool, Arena(budgets.device_weight_bytes, weights)

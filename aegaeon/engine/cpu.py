"""Opens a ModelEngine on the CPU for the settings and models of a server."""

from aegaeon.config import Settings
from aegaeon.device.cpu import CpuDevice
from aegaeon.engine.engine import ModelEngine
from aegaeon.memory.budget import choose_budgets
from aegaeon.memory.kv import KvPool, KvShape
from aegaeon.models.config import read_config
from aegaeon.models.registry import load_model
from aegaeon.types import ModelId, ModelSpec


def open_cpu_engine(
    settings: Settings, specs: tuple[ModelSpec, ...], kv_path: str | None
) -> ModelEngine:
    """Return the engine, its KV in the node's pool at `kv_path`, if any. Raises BudgetTooSmall,
    RegionError, and what reading a config.json raises."""
    device = CpuDevice()
    budgets = choose_budgets(settings, specs)
    shapes = kv_shapes(specs, device)
    pool = None
    if kv_path is not None:
        pool_bytes = settings.instance_count * budgets.kv_bytes
        pool = KvPool(pool_bytes, shapes.values(), kv_path, budgets.kv_bytes)
    return ModelEngine(specs, shapes, device, budgets, load_model, pool)


def kv_shapes(specs: tuple[ModelSpec, ...], device: CpuDevice) -> dict[ModelId, KvShape]:
    """Return what a token of each model keeps."""
    shapes = {}
    for spec in specs:
        config = read_config(spec.path)
        shapes[spec.id] = KvShape(config.layers, config.kv_heads, config.head_dim, device.dtype)
    return shapes

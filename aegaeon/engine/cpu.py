"""Opens a ModelEngine on the CPU for the settings and models of a server."""

from aegaeon import _native
from aegaeon.config import Settings
from aegaeon.device.cpu import CpuDevice
from aegaeon.engine.engine import ModelEngine
from aegaeon.errors import ConfigError
from aegaeon.memory.budget import choose_budgets
from aegaeon.memory.kv import KvShape
from aegaeon.models.config import read_config
from aegaeon.models.registry import load_model
from aegaeon.types import ModelId, ModelSpec


def open_cpu_engine(settings: Settings, specs: tuple[ModelSpec, ...]) -> ModelEngine:
    """Return the engine. Raises BudgetTooSmall, ConfigError (instructions that this processor does
    not have), and what reading a config.json raises."""
    try:
        _native.force_isa(settings.instruction_set)
    except ValueError as error:
        raise ConfigError(f"--instruction-set: {error}") from None
    budgets = choose_budgets(settings, specs)
    device = CpuDevice(budgets.threads)
    return ModelEngine(specs, kv_shapes(specs, device), device, budgets, load_model)


def kv_shapes(specs: tuple[ModelSpec, ...], device: CpuDevice) -> dict[ModelId, KvShape]:
    """Return what a token of each model keeps."""
    shapes = {}
    for spec in specs:
        config = read_config(spec.path)
        shapes[spec.id] = KvShape(config.layers, config.kv_heads, config.head_dim, device.dtype)
    return shapes

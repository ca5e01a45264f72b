"""Opens the engine that the settings ask for; torch is imported only by those that compute."""

import time
from collections.abc import Callable
from importlib import import_module
from typing import cast

from aegaeon.config import Settings
from aegaeon.engine.base import Engine, NullEngine
from aegaeon.types import ModelSpec

Opener = Callable[[Settings, tuple[ModelSpec, ...], str | None], Engine]


def open_engine(
    settings: Settings, specs: tuple[ModelSpec, ...], kv_path: str | None = None
) -> Engine:
    """Return the engine for `settings.device` serving `specs`, its KV in the node's pool at
    `kv_path` (None: in one of its own). Raises BudgetTooSmall, RegionError."""
    return OPENERS[settings.device](settings, specs, kv_path)


def _open_null(_: Settings, specs: tuple[ModelSpec, ...], __: str | None) -> Engine:
    return NullEngine(specs, pause=time.sleep)


def _open_cpu(settings: Settings, specs: tuple[ModelSpec, ...], kv_path: str | None) -> Engine:
    # Imported here because torch takes seconds and a null instance does without it.
    opener = cast(Opener, import_module("aegaeon.engine.cpu").open_cpu_engine)
    return opener(settings, specs, kv_path)


OPENERS: dict[str, Opener] = {"cpu": _open_cpu, "null": _open_null}

"""Opens the engine that the settings ask for; torch is imported only by those that compute."""

import time
from collections.abc import Callable
from importlib import import_module
from typing import cast

from aegaeon import _native
from aegaeon.config import Settings
from aegaeon.engine.base import Engine, NullEngine
from aegaeon.engine.regions import Regions
from aegaeon.types import ModelSpec

Opener = Callable[[Settings, tuple[ModelSpec, ...], Regions], Engine]


def open_engine(settings: Settings, specs: tuple[ModelSpec, ...], regions: Regions) -> Engine:
    """Return the engine for `settings.device` serving `specs`; it joins `regions` or makes them.

    Removing the regions is the business of who named them. Raises BudgetTooSmall, RegionError,
    RegionMismatch, DeviceError.
    """
    return OPENERS[settings.device.partition(":")[0]](settings, specs, regions)


def _open_null(_: Settings, specs: tuple[ModelSpec, ...], __: Regions) -> Engine:
    return NullEngine(specs, pause=time.sleep)


def _open_cpu(settings: Settings, specs: tuple[ModelSpec, ...], regions: Regions) -> Engine:
    # Imported here because torch takes seconds and a null instance does without it.
    opener = cast(Opener, import_module("aegaeon.engine.cpu").open_cpu_engine)
    return opener(settings, specs, regions)


def _open_staged(settings: Settings, specs: tuple[ModelSpec, ...], regions: Regions) -> Engine:
    opener = cast(Opener, import_module("aegaeon.engine.staged").open_staged_engine)
    return opener(settings, specs, regions)


def _open_cuda(settings: Settings, specs: tuple[ModelSpec, ...], regions: Regions) -> Engine:
    _native.count_cuda_devices()  # a build without CUDA lacks the names that those modules take
    opener = cast(Opener, import_module("aegaeon.engine.cuda").open_cuda_engine)
    return opener(settings, specs, regions)


OPENERS: dict[str, Opener] = {
    "cpu": _open_cpu, "staged": _open_staged, "cuda": _open_cuda, "null": _open_null
}  # fmt: skip

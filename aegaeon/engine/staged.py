"""Opens a ModelEngine on a staged device: memory of its own, here in the host's, behind a link.

It computes as the CPU does, so that all that a device with memory of its own needs (copies of
weights and KV, in and out, beside compute) runs and is measured on any machine.
"""

from aegaeon._native import CopyEngine
from aegaeon.config import Settings
from aegaeon.engine.engine import ModelEngine
from aegaeon.engine.own_memory import OwnMemory, open_on
from aegaeon.engine.regions import Regions
from aegaeon.memory.budget import COPY_CHUNK_BYTES, COPY_THREADS, GB
from aegaeon.types import ModelSpec


def open_staged_engine(
    settings: Settings, specs: tuple[ModelSpec, ...], regions: Regions
) -> ModelEngine:
    """Return the engine. Raises what `open_on` raises."""
    rate = int(settings.link_gb_per_s * GB)
    staged = OwnMemory(
        allocate=lambda _: None,
        open_link=lambda: CopyEngine(COPY_THREADS, COPY_CHUNK_BYTES, rate),
    )
    return open_on(staged, settings, specs, regions)

"""Names for the shared memory of an engine under test, and nothing left of them afterwards."""

import itertools
import os
from contextlib import contextmanager
from pathlib import Path

from aegaeon.engine.regions import Regions
from aegaeon.store.names import SHARED_MEMORY

_numbers = itertools.count()


@contextmanager
def own_regions(directory: Path = SHARED_MEMORY):
    """Yield Regions that nobody else has; what they came to hold is removed."""
    stem = f"aegaeon-test-{os.getpid()}-{next(_numbers)}"
    try:
        yield Regions(str(directory / f"{stem}.weights"), str(directory / f"{stem}.kv"))
    finally:
        for path in directory.glob(f"{stem}.*"):
            path.unlink()

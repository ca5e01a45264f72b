"""Names in /dev/shm for one test each, removed after it."""

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from aegaeon import _native

NUMBERS = count()


@pytest.fixture
def region_path() -> Iterator[str]:
    path = f"/dev/shm/aegaeon-test-{os.getpid()}-{next(NUMBERS)}"
    yield path
    _native.unlink(path)
    left_over = [str(name) for name in Path("/dev/shm").glob(f"{Path(path).name}*")]
    assert left_over == []

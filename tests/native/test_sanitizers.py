"""Native code under the thread and address sanitizers, in programs without Python."""

import tempfile
from collections.abc import Iterator

import pytest

from tests.support.sanitized import CSRC, SANITIZERS, run_sanitized

# The first to need a program compiles it, maybe on a busy machine; programs have a limit of theirs.
pytestmark = pytest.mark.timeout(300)

# The directories of csrc/ that each program of csrc/testing/ is made of.
PROGRAMS = {
    "shm_stress": ("shm",),
    "copy_schedule": ("copy", "shm"),
    "copy_stress": ("copy", "shm"),
    "kv_stress": ("memory", "shm"),
    "cache_stress": ("memory", "shm"),
    "relay_stress": ("relay",),
}


@pytest.fixture
def shm_directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="aegaeon-test-", dir="/dev/shm") as directory:
        yield directory


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_sanitizers_find_nothing(name, sanitizer, shm_directory):
    parts = PROGRAMS[name]
    sources = [source for part in parts for source in sorted((CSRC / part).glob("*.cpp"))]
    run_sanitized(name, sources, sanitizer, shm_directory)

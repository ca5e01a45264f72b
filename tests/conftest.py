"""One compute thread in tests and what they start: small products gain nothing from more, and
OpenMP teams that spin beside other processes lose much. Set before anything imports torch."""

import logging
import os
import sys

import hypothesis
import pytest

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Else each process that a test starts compiles all it imports: seconds of it, with torch.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# No test is timed: another process may have the processor.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# First what takes long: else a worker gets it last, while the others have nothing left to do. What
# compiles all the time runs beside what waits for processes.
LONG = (
    "native/test_ops_sanitizers",
    *(f"end_to_end/test_{name}" for name in ("split_roles", "kills", "deaths")),
    *("cuda/test_kernel_faults", "cuda/test_compiled", "cuda/test_attend", "cuda/test_copies"),
    *("native/test_sanitizers", "end_to_end/", "scheduler/test_policies", "benchmark/"),
)


def pytest_collection_modifyitems(items):
    """Put long files first; those of a kind and all others stay in their order."""

    def rank(item):
        return min((n for n, part in enumerate(LONG) if part in item.nodeid), default=len(LONG))

    items.sort(key=rank)


@pytest.fixture
def root_level():
    """Puts back from which level on events are written."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)

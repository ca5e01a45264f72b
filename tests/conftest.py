"""One compute thread in tests and what they start: small products gain nothing from more, and
OpenMP teams that spin beside other processes lose much. Set before anything imports torch."""

import os

import hypothesis

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# No test is timed: another process may have the processor.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# First what takes long: else a worker gets it last, while the others have nothing left to do.
LONG = (
    *("native/test_sanitizers", "end_to_end/", "native/test_ops_sanitizers"),
    *("cuda/test_kernel_faults", "cuda/test_compiled", "cuda/test_attend"),
)


def pytest_collection_modifyitems(items):
    """Put long files first; those of a kind and all others stay in their order."""
    items.sort(key=lambda item: min((n for n, x in enumerate(LONG) if x in item.nodeid), default=9))

"""Where the CUDA toolkit is on this machine, for tests that compile against it."""

import os
import shutil
from pathlib import Path

import pytest


def find_toolkit() -> Path | None:
    """Return the directory with `include/` and `bin/nvcc`, or None where there is none."""
    named = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [Path(place) for place in named if place]
    if nvcc := shutil.which("nvcc"):
        places.append(Path(nvcc).resolve().parents[1])
    places += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    return next((place for place in places if (place / "include/cuda_runtime.h").exists()), None)


def the_toolkit() -> Path:
    """Return the toolkit; skip the test where there is none."""
    found = find_toolkit()
    if found is None:
        pytest.skip("no CUDA toolkit here: install it, or set CUDA_HOME to where it is")
    return found

"""Faults put into how steps run on a CUDA device: each is found by the tests of steps."""

import os
import subprocess
import sys

import pytest

from tests.support.cuda_stand_in import MUTANT, build_stand_in
from tests.support.sanitized import ROOT

# It takes long; `make check-cuda` and `make test-all` run it.
pytestmark = pytest.mark.thorough

EXCHANGE, UPLOAD = "cuda/exchange.cpp", "ops/cuda/step_upload.cpp"
UPLOADS = "test_steps_are_not_waited_for"
GROWN = "test_a_room_that_has_grown"
# The fault, and the tests of test_steps.py that must not pass.
MUTANTS = {
    "an upload's memory is written while it is read": (
        (EXCHANGE, "  buffer.free.wait();", "  //"),
        UPLOADS,
    ),
    "an upload is known to be read before it was copied": (
        (EXCHANGE, "  buffer.free.record(device_->compute());", "  //"),
        UPLOADS,
    ),
    "a graph reads tables where they were": (
        (
            UPLOAD,
            "static_cast<const void*>(base),",
            "static_cast<const void*>(base == nullptr ? base : nullptr),",
        ),
        GROWN,
    ),
    "a graph of one split is taken for two": (
        (UPLOAD, "bounds.splits,", "std::size_t{0},"),
        "test_contexts_of_more_splits",
    ),
    "a row of nobody is appended": (
        ("ops/cuda/tables.cpp", "RowPlace{-1, 0}", "RowPlace{0, 0}"),
        "test_a_row_has_its_bits",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_each_fault_of_steps_is_found(name, tmp_path, record_property):
    mutant, tests = MUTANTS[name]
    made = build_stand_in(mutant, tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-x", "-p", "no:cacheprovider"]
    command += ["tests/cuda/test_steps.py", "-k", tests]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, MUTANT: str(made)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode != 0, "nobody saw that " + name
    assert "passed" not in result.stdout or "failed" in result.stdout
    record_property("cuda fault", name)

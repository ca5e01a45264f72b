"""benchmark/store.py runs as users type it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arguments", [["benchmark/store.py"], ["-m", "benchmark.store"]])
def test_it_starts_by_its_path_from_anywhere_and_as_a_module(arguments, tmp_path):
    pytest.importorskip("zmq", reason="pyzmq is not installed (pip install -e '.[bench]')")
    is_path = arguments[0] != "-m"
    command = [sys.executable, *([str(ROOT / arguments[0])] if is_path else arguments), "--help"]
    where = tmp_path if is_path else ROOT
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--redis-url" in done.stdout

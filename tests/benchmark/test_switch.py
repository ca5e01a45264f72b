"""benchmark/switch.py runs as users type it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aegaeon.models.references import resolve
from benchmark.random_model import SMALL, write_model

ROOT = Path(__file__).parents[2]


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_it_measures_every_row_when_started_by_its_path(tmp_path):
    command = [sys.executable, str(ROOT / "benchmark/switch.py"), "--quick", "--json"]
    flags = ["--dir", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *flags], cwd=tmp_path, **pipes) as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    rows = json.loads(output)["rows"]
    cases = [row["case"].partition(",")[0] for row in rows]
    once = dict.fromkeys(cases)
    assert list(once) == [
        "cold load",
        "cold first token",
        "warm switch on cpu",
        "staged switch",
        "share of a prefetch hidden",
        "a step of decoding beside the copy",
        "memory traffic of decoding alone",
        "memory traffic of the copy alone",
        "memory traffic of both",
        "KV out",
        "KV in",
        "a block",
    ]
    assert all(row["ours"] > 0 for row in rows)
    assert list(tmp_path.iterdir()) == []
    # Others may run the benchmark beside us.
    assert list(Path("/dev/shm").glob(f"aegaeon-benchmark-{process.pid}.*")) == []


def test_a_random_model_is_one_that_can_be_served(tmp_path):
    path = write_model(tmp_path / "m", SMALL)
    spec = resolve(str(tmp_path / "m"), str(tmp_path))
    # The header against norms, which are wider in memory.
    assert abs(path.stat().st_size - spec.weight_bytes) < 100_000

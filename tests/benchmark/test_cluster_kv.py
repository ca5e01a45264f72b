"""benchmark/cluster_kv.py runs as users type it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.thorough
def test_it_measures_little(tmp_path):
    command = [sys.executable, str(ROOT / "benchmark/cluster_kv.py"), "--quick", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["case"]: row for row in json.loads(done.stdout)["rows"]}
    (speed,) = (row for row in rows.values() if row["unit"] == "GB/s")
    assert speed["ours"] > 0 and speed["peer_value"] > 0
    assert sum("step of" in case for case in rows) == 2
    assert list(tmp_path.iterdir()) == []

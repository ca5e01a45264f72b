"""benchmark/copies.py runs as users type it."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_measures_every_row_when_started_by_its_path(tmp_path):
    command = [sys.executable, str(ROOT / "benchmark/copies.py"), "--quick", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["unit"] for row in rows] == ["GB/s"] * 4 + ["us"] * 2
    assert all(row["ours"] > 0 for row in rows)

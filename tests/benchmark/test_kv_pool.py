"""benchmark/kv_pool.py measures what it says."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmark" / "kv_pool.py"


def test_a_quick_run_reports_speed_and_fragmentation(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["unit"] for row in rows] == ["ns", "ns", "%", "%"]
    assert all(0 < row["ours"] < 100 for row in rows if row["unit"] == "%")

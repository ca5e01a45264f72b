"""benchmark/cluster_weights.py runs as users type it."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_measures_a_small_model(tmp_path):
    script = str(ROOT / "benchmark/cluster_weights.py")
    where = ["--disk", str(tmp_path), "--memory", str(tmp_path)]
    command = [sys.executable, script, "--quick", "--json", *where]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    fetched = [row for row in rows if row["aim"]]
    assert len(fetched) == 4
    assert all(row["ours"] > 0 and row["ratio_to_limit"] > 0 for row in fetched)
    assert list(tmp_path.iterdir()) == []

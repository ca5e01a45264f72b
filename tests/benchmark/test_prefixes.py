"""benchmark/prefixes.py measures what it says."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmark" / "prefixes.py"


def test_a_quick_run_reports_a_second_turn_and_the_index(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    turn, at_two, *looks = json.loads(done.stdout)["rows"]
    assert turn["ratio_to_peer"] > 1 and at_two["ratio_to_peer"] > 1
    assert "2 instances" in at_two["case"] and "(2 of 2 found them)" in at_two["case"]
    assert len(looks) == 4 and all(row["ours"] > 0 for row in looks)

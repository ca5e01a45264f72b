"""benchmark/prefixes.py measures what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import make_checkpoint

SCRIPT = Path(__file__).parents[2] / "benchmark" / "prefixes.py"


def rows(directory, *flags):
    command = [sys.executable, str(SCRIPT), "--quick", "--json", *flags]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["rows"]


def test_a_quick_run_reports_a_second_turn_and_the_index(tmp_path):
    turn, *looks = rows(tmp_path)
    assert turn["ratio_to_peer"] > 1
    assert len(looks) == 4 and all(row["ours"] > 0 for row in looks)


@pytest.mark.thorough
def test_with_a_checkpoint_servers_of_two_instances_are_measured(tmp_path):
    model = make_checkpoint(tmp_path / "model", vocab_size=1024, max_position_embeddings=4096)
    _, at_two, split, *looks = rows(tmp_path, "--model", str(model))
    assert "2 instances" in at_two["case"] and "one that decodes" in split["case"]
    for row in (at_two, split):
        assert "(2 of 2 found them)" in row["case"]
        assert row["ours"] > 0 and row["peer_value"] > 0
    assert len(looks) == 4

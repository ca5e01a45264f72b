"""benchmark/kernels.py runs as users type it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark.limits import Limits, Pace, alternate

ROOT = Path(__file__).parents[2]


def run(tmp_path, *flags):
    command = [sys.executable, str(ROOT / "benchmark/kernels.py"), "--quick", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_measures_every_operator_when_started_by_its_path(tmp_path):
    rows = json.loads(run(tmp_path, "--json"))["rows"]
    assert all(row["ours"] > 0 or row["unit"] == "processors" for row in rows)
    found = {row["case"].split()[0].rstrip(",") for row in rows}
    operators = {"linear", "gated", "rms_norm", "rotate", "embed", "append", "attention", "sample"}
    assert operators | {"limit:", "fork", "log-probabilities"} <= found
    linear = [row for row in rows if row["case"].startswith("linear bf16, qkv")]
    # What binds comes first, and is another thing on another machine.
    assert sorted(row["unit"] for row in linear) == ["GB/s", "GB/s", "GFLOP/s", "GFLOP/s"]
    assert all(row["peer"] == "torch" and row["peer_value"] > 0 for row in linear)
    gated = [row for row in rows if row["case"].startswith(("gated bf16", "gated int8"))]
    attention = [row for row in rows if row["case"] == "attention bf16, decode at 40"]
    assert len(gated) == 12 and len(attention) == 2
    assert all(row["peer_value"] > 0 for row in gated + attention)
    layer = [row for row in rows if row["case"] == "linear bf16, a layer, 1 row"]
    told = {row["unit"]: row["met"] for row in layer}
    assert told["GB/s"] in (True, False) and told["GFLOP/s"] is None


def test_only_what_is_asked_for_is_measured(tmp_path):
    table = run(tmp_path, "--only", "pool,sampling", "--instruction-set", "baseline")
    assert "fork and join" in table and "top-p" in table and "baseline" in table
    assert "linear" not in table


def test_an_unknown_kind_is_refused(tmp_path):
    command = [sys.executable, str(ROOT / "benchmark/kernels.py"), "--only", "pool,magic"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "not magic" in done.stderr


def test_whichever_takes_longer_at_the_limits_binds():
    limits = Limits(read_gb_per_s=10.0, gflop_per_s=100.0)
    assert limits.seconds(2e9, 1e9) == pytest.approx(0.2)
    assert limits.seconds(1e9, 50e9) == pytest.approx(0.5)
    assert limits.is_bound_by_memory(2e9, 1e9) and not limits.is_bound_by_memory(1e9, 50e9)


def test_ways_alternate_and_a_slow_one_runs_less_often(monkeypatch):
    now = 0.0
    ran = []

    def way(name, took_s):
        def run():
            nonlocal now
            now += took_s
            ran.append(name)

        return run

    monkeypatch.setattr("time.perf_counter", lambda: now)
    monkeypatch.setattr("time.sleep", lambda _: None)
    ways = {"fast": way("fast", 0.5), "slow": way("slow", 30.0)}
    seconds = alternate(ways, Pace(repeats=4, run_s=0.5, patience_s=5.0))
    assert seconds == {"fast": 0.5, "slow": 30.0}
    # Two of each before the first run: to warm up, and to see how long one takes.
    assert ran[4:] == ["fast", "slow", "fast", "fast", "fast"]

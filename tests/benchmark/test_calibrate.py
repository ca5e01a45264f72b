"""Calibration: lines are found in what is measured, and the command measures and writes them."""

import json
import math
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from aegaeon.scheduler.cost import ModelCost, decode_costs
from benchmark.calibration_fit import Sample, Step, errors, fit, replay
from benchmark.calibration_runs import (
    Meter,
    Reading,
    Scale,
    any_prompts,
    batch_lengths,
    measure,
    prompts,
    quietest,
)
from benchmark.random_model import SMALL, write_model

ROOT = Path(__file__).parents[2]
LINE = (1e-5, 3e-3, 0.012)
COST = ModelCost(
    weight_gb=0.3, kv_gb_per_token=5e-5, max_len=2048, prefill=(2.5e-3, 4e-7, 0.02), decode=LINE
)


def steps_of(line, count, seed=0, spread=0.05):
    """Decode steps that take what `line` says, about."""
    rng = random.Random(seed)
    for _ in range(count):
        requests = rng.randint(1, 16)
        amounts = (float(requests * rng.randint(16, 800)), float(requests))
        took_s = line[0] * amounts[0] + line[1] * amounts[1] + line[2]
        yield Sample(amounts, took_s * math.exp(rng.gauss(0, spread)))


def test_a_fit_finds_the_line_behind_noise_and_stalls():
    samples = list(steps_of(LINE, 60))
    samples[::12] = [Sample(one.amounts, 10 * one.took_s) for one in samples[::12]]
    found = fit(samples)
    assert max(errors(found, steps_of(LINE, 100, seed=1, spread=0))) < 8


def test_a_fit_leaves_out_what_would_be_negative_or_cannot_be_told():
    falling = [Sample((x, x * x), 0.1 * x - 1e-4 * x * x + 0.01) for x in (1.0, 5.0, 50.0, 100.0)]
    assert fit(falling)[1] == 0
    same_size = [Sample((0.27,), took_s) for took_s in (0.1, 0.11, 0.12)]
    assert fit(same_size) == (pytest.approx(0.11 / 0.27, rel=0.02), pytest.approx(0, abs=1e-5))


def test_a_replay_predicts_each_step_before_it_learns_of_it():
    slower = tuple(2 * value for value in LINE)
    steps = [Step("decode", sample) for sample in steps_of(slower, 100)]
    plain, refined = replay(COST, steps)
    assert all(error == pytest.approx(50, abs=10) for error in plain["decode"])
    assert refined["decode"][0] == plain["decode"][0]
    assert max(refined["decode"][20:]) < 25


def test_points_are_as_long_as_the_scale_says_and_no_longer():
    rng = random.Random(0)
    assert prompts(1024, 8)[0] == (8,) and (1024,) in prompts(1024, 8)
    assert all(sum(one) <= 64 and len(one) <= 3 for one in prompts(64, 3) if len(one) > 1)
    for longest in (64, 1024):
        for _ in range(200):
            lengths = any_prompts(longest, 8, rng)
            assert 1 <= len(lengths) <= 8 and min(lengths) >= 8 and sum(lengths) <= longest
    assert batch_lengths(Scale(longest=512, max_batch=4)) == [8, 32, 128, 512]
    assert batch_lengths(Scale(longest=512, max_batch=1)) == [8]


def test_the_least_disturbed_readings_count():
    readings = [(3.0, 0.9), (1.0, 0.3), (1.2, 0.25), (1.4, 0.4), (9.0, 1.5)]
    samples = [Reading(Sample((1.0,), took_s), disturbed) for took_s, disturbed in readings]
    assert quietest(samples).took_s == 1.2


def test_each_point_is_read_in_every_round():
    taken = []

    def run(point):
        taken.append(point)
        return Sample((float(point),), 0.02 + point)

    meter = Meter(1, Scale(reading_s=0.01, patience_s=0.0))
    samples = measure(meter, [partial(run, point) for point in range(5)], 3, random.Random(0))
    assert [sample.amounts for sample in samples] == [(float(point),) for point in range(5)]
    assert sorted(taken) == sorted([*range(5)] * 3) and meter.readings == 15


@pytest.mark.parametrize(
    ("device", "quantize", "kv_dtype"),
    [
        ("cpu", "none", "float32"),
        pytest.param("staged", "int8", "bfloat16", marks=pytest.mark.thorough),
    ],
)
def test_it_measures_and_writes_costs_when_started_by_its_path(
    tmp_path, device, quantize, kv_dtype
):
    write_model(tmp_path / "small", SMALL)
    before = set(Path("/dev/shm").glob("aegaeon-benchmark-*"))
    command = [sys.executable, str(ROOT / "benchmark/calibrate.py"), "--quick", "--json"]
    command += ["--models-dir", str(tmp_path), "--models", "a=small,b=small", "--device", device]
    command += ["--threads-per-instance", "1", "--device-memory-gb", "0.2", "--out", "costs.json"]
    command += ["--quantize", quantize, "--kv-dtype", kv_dtype, "--activation-dtype", kv_dtype]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(Path("/dev/shm").glob("aegaeon-benchmark-*")) <= before

    costs = decode_costs((tmp_path / "costs.json").read_bytes(), "costs.json")
    assert costs.model_mix == ("a", "b") and costs.models["a"] == costs.models["b"]
    assert costs.device_memory_gb == 0.2
    assert costs.models["a"].types == (quantize, kv_dtype, kv_dtype)
    assert (costs.move_s(costs.models["a"], 1000) > 0) == (device == "staged")
    rows = {row["case"]: row for row in json.loads(done.stdout)["rows"]}
    clocked = ("prefill, held out, thread's clock", "decode, held out, thread's clock")
    for case in (*clocked, "load, held out"):
        assert rows[f"{case}, error p50"]["aim"] == "<= 10 %"
        assert rows[f"{case}, error p90"]["aim"] == "<= 25 %"
    assert ("KV out and in, held out, error p50" in rows) == (device == "staged")
    assert rows["readings that others disturbed"]["unit"] == "%"
    assert rows["served decode, refined, error p50"]["ours"] > 0

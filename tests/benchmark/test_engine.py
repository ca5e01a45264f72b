"""benchmark/engine.py runs as users type it; and what it makes of its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aegaeon.models.references import resolve
from benchmark import engine, engine_cases, engine_peers
from benchmark.engine_cases import Case, Compute, ceiling, work_of
from benchmark.limits import Limits
from benchmark.random_model import QWEN3_06B, SMALL, write_model

ROOT = Path(__file__).parents[2]
# Answers as llama-bench and llama-batched-bench do.
LLAMA_BENCH = """#!{python}
import json, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert flags["-m"] == "model.gguf" and flags["-t"] == "2" and flags["-o"] == "json"
asked = {{"n_prompt": int(flags["-p"]), "n_gen": int(flags["-n"]), "n_depth": flags.get("-d", 0)}}
print(json.dumps([asked | {{"avg_ts": 1000.0 + asked["n_prompt"]}}]))
"""
LLAMA_BATCHED = """#!{python}
import json, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert int(flags["-c"]) >= int(flags["-npl"]) * (int(flags["-npp"]) + int(flags["-ntg"]))
print("loading")
print(json.dumps({{"pp": flags["-npp"], "pl": flags["-npl"], "speed_pp": 1.0, "speed_tg": 77.5}}))
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A directory of programs that come first on PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")

    def add(name, text):
        path = directory / name
        path.write_text(text.format(python=sys.executable))
        path.chmod(0o755)

    return add


@pytest.mark.timeout(300)
def test_it_measures_every_case_when_started_by_its_path(tmp_path):
    command = [sys.executable, str(ROOT / "benchmark/engine.py"), "--quick", "--json"]
    flags = ["--dir", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *flags], cwd=tmp_path, **pipes) as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    report = json.loads(output)
    rows = [row for row in report["rows"] if row["case"].startswith("bf16")]
    assert all(row["ours"] > 0 for row in rows)
    cases = ["prefill of 32", "prefill of 70"]
    cases += [f"decode, batch {batch}, context {at}" for at in (16, 40) for batch in (1, 8)]
    for case in cases:
        alone, *against = [row for row in rows if row["case"] == f"bf16, {case}"]
        assert alone["limit"] > 0 and alone["peer"] is None
        assert [row["peer"] for row in against] == ["transformers"]
    assert any(row["case"].endswith("to batch 1") and row["met"] is not None for row in rows)
    assert any("llama.cpp" in text for text in report["skipped"])
    assert list(tmp_path.iterdir()) == []
    # Others may run the benchmark beside us.
    assert list(Path("/dev/shm").glob(f"aegaeon-benchmark-{process.pid}.*")) == []


def test_llamas_figures_come_from_its_programs(tmp_path, programs):
    programs("llama-bench", LLAMA_BENCH)
    programs("llama-batched-bench", LLAMA_BATCHED)
    llama = engine_peers.Llama("model.gguf", 2)
    assert llama.tokens_per_s(Case("prefill", 512)) == 1512.0
    assert llama.tokens_per_s(Case("decode", 16)) == 1000.0
    assert llama.tokens_per_s(Case("decode", 4096)) == 1000.0
    assert llama.tokens_per_s(Case("decode", 16, 8)) == 77.5
    assert llama.tokens_per_s(Case("decode", 4096, 8)) is None


def test_a_program_that_fails_says_so(programs):
    programs("llama-bench", "#!{python}\nraise SystemExit('no such model')\n")
    with pytest.raises(SystemExit, match="no such model"):
        engine_peers.Llama("model.gguf", 2).tokens_per_s(Case("prefill", 512))


def test_ceilings_are_bandwidth_for_steps_and_multiply_adds_for_prompts(tmp_path):
    write_model(tmp_path / "m", SMALL)
    spec = resolve(str(tmp_path / "m"), "")
    limits = Limits(read_gb_per_s=1.0, gflop_per_s=1e9)
    step_s = (spec.weight_bytes + 8 * 100 * spec.kv_token_bytes) / 1e9
    assert ceiling(Case("decode", 100, 8), spec, limits) == pytest.approx(8 / step_s)
    slow = Limits(read_gb_per_s=1e9, gflop_per_s=1.0)
    # Every weight but the embedding's is multiplied with every token.
    sizes = SMALL["hidden_size"], SMALL["intermediate_size"]
    layer = sizes[0] * (4 + 2 + 2 + 4) * 64 + 3 * sizes[0] * sizes[1]
    flops = 2 * (100 * 4 * layer + 4096 * sizes[0]) + 4 * 4 * 4 * 64 * 100 * 101 / 2
    assert work_of(Case("prefill", 100), spec).flops == flops
    assert ceiling(Case("prefill", 100), spec, slow) == pytest.approx(100 / (flops / 1e9))


def test_aims_are_those_of_the_shape_that_is_measured(tmp_path):
    write_model(tmp_path / "m", SMALL)
    small = resolve(str(tmp_path / "m"), "")
    assert QWEN3_06B["num_hidden_layers"] == 28
    assert engine.ceiling_aim("bf16", Case("decode", 16), small).bound == 0.70
    assert engine.ceiling_aim("bf16", Case("decode", 4096), small) is None
    assert engine.ceiling_aim("bf16", Case("prefill", 512), small).bound == 0.75
    assert engine.peer_aim("int8", Case("prefill", 512), "llama.cpp").bound == 1.6
    assert engine.peer_aim("int8", Case("prefill", 2048), "llama.cpp") is None
    assert engine.peer_aim("bf16", Case("decode", 512, 4), "transformers").bound == 3.0


def test_what_does_not_fit_is_skipped_with_its_reason(tmp_path, monkeypatch):
    write_model(tmp_path / "m", SMALL)
    spec = resolve(str(tmp_path / "m"), "")
    monkeypatch.setattr(engine_cases, "available_bytes", lambda: 100 * spec.kv_token_bytes * 1000)
    effort = engine.Effort(1, 0.0, Compute(1), 0.0)
    bench = engine.Bench(spec, "bf16", effort)
    cases = [Case("prefill", 64), Case("decode", 16, 4), Case("decode", 4096, 32)]
    assert bench._fitting([*cases, Case("prefill", 40_000)]) == cases[:2]
    assert "its KV takes" in bench.skipped[0] and "context has 32768" in bench.skipped[1]

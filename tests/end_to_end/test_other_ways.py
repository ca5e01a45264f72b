"""The other ways in: `uvicorn aegaeon.proxy:app`, the offline benchmark, the demo."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from benchmark.demo import QUESTIONS
from tests.support.checkpoints import make_checkpoint
from tests.support.polling import eventually
from tests.support.redis_server import RedisServer, require_redis
from tests.support.server import ROOT, SHARED_MEMORY, Streamed, left_in_shared_memory


def environment(**values):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AEGAEON_")}
    return {**kept, "PYTHONPATH": str(ROOT), **values}


def test_uvicorn_alone_serves_and_takes_its_instances_along(checkpoints, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url, domain = f"http://127.0.0.1:{port}", f"uvicorn-{os.getpid()}"
    command = [sys.executable, "-m", "uvicorn", "aegaeon.proxy:app", "--port", str(port)]
    settings = environment(
        AEGAEON_MODELS=",".join(f"{name}={path}" for name, path in checkpoints.items()),
        AEGAEON_DOMAIN=domain,
        AEGAEON_THREADS_PER_INSTANCE="1",
        AEGAEON_QUANTIZE="int8",
    )
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=settings, cwd=ROOT, stdout=log, stderr=log)

    def is_healthy():
        assert process.poll() is None, (tmp_path / "log").read_text()
        try:
            return httpx.get(f"{url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    try:
        eventually(is_healthy, within_s=60)
        cards = httpx.get(f"{url}/v1/models", timeout=5).json()["data"]
        assert {card["quantize"] for card in cards} == {"int8"}
        assert Streamed(url, "bob", "the device", 10).whole()
    finally:
        process.terminate()
        process.wait(30)
    assert left_in_shared_memory(domain) == []


@pytest.mark.parametrize(
    ("backend", "quantize"),
    [("shared_memory", "int8"), pytest.param("redis", "none", marks=pytest.mark.thorough)],
)
def test_the_offline_benchmark_reports_three_models(checkpoints, tmp_path, backend, quantize):
    flags = ["--models", ",".join(f"{name}={path}" for name, path in checkpoints.items())]
    flags += ["--num-requests", "6", "--max-new-tokens", "16", "--prompt-chars", "40"]
    flags += ["--colocated-count", "2", "--preload-per-instance", "2", "--seed", "3"]
    flags += ["--metadata-backend", backend, "--threads-per-instance", "1"]
    flags += ["--quantize", quantize]
    flags += ["--trace-json", str(tmp_path / "trace"), "--out-json", str(tmp_path / "out")]
    server = None
    if backend == "redis":
        require_redis()
        server = RedisServer(tmp_path)
        server.start()
        flags += ["--redis-url", server.url]
    try:
        command = [sys.executable, "benchmark/offline_qwen3_colocation.py", *flags]
        done = subprocess.run(
            command, env=environment(), cwd=ROOT, capture_output=True, timeout=90, check=False
        )
    finally:
        if server is not None:
            server.kill()
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "out").read_text())
    assert (report["generated_tokens"], report["failed_requests"]) == (6 * 16, 0)
    assert report["token_per_s"] == pytest.approx(96 / report["wall_time_s"])
    assert report["device"] == "cpu"
    assert set(report["per_model"]) == set(checkpoints)
    for latency in (report, *report["per_model"].values()):
        for name in ("ttft_ms", "tbt_ms"):
            assert set(latency[name]) == {"avg", "p50", "p90", "p99"}
            # Tokens that are taken in at once have no time between them.
            assert latency[name]["avg"] > 0 or name == "tbt_ms"
    switching = report["instance_switching"].values()
    assert sum(one["requests"] for one in switching) == 6
    assert sum(one["switches"] for one in switching) >= 3
    trace = json.loads((tmp_path / "trace").read_text())
    assert [one["model"] for one in trace] == [*checkpoints] * 2
    assert {len(one["token_times_s"]) for one in trace} == {16}


@pytest.fixture
def demo_models(tmp_path):
    for seed, name in enumerate(QUESTIONS):
        make_checkpoint(tmp_path / name, "llama", seed=seed, max_position_embeddings=2048)
    return tmp_path


def demo_command(demo_models):
    flags = ["--gguf", "unused.gguf", "--models-dir", str(demo_models)]
    return [sys.executable, "benchmark/demo.py", *flags]


def domains():
    return {path.name for path in SHARED_MEMORY.glob("aegaeon-port-*.lock")}


def test_the_demo_shows_all_answers_and_a_table(demo_models):
    done = subprocess.run(
        demo_command(demo_models),
        **{"env": environment(), "cwd": ROOT, "capture_output": True, "text": True},
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in QUESTIONS:
        assert f"{name} @ instance-" in done.stdout
    assert "TTFT" in done.stdout and "switched models" in done.stdout


@pytest.mark.thorough
def test_an_interrupted_demo_stops_its_server(demo_models):
    before = domains()
    process = subprocess.Popen(
        demo_command(demo_models), env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with process:
        deadline_s = time.monotonic() + 60
        for line in process.stdout:
            if line.startswith("asking "):
                break
            assert time.monotonic() < deadline_s
        port = int(line.split()[-1].rpartition(":")[2])
        process.send_signal(signal.SIGINT)
        assert process.wait(40) == 130
    eventually(lambda: f"aegaeon-port-{port}.lock" not in domains() - before)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/health", timeout=5)

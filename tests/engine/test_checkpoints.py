"""The engine as a server opens it: checkpoints of every family, two models at once, threads."""

import os
import subprocess
import sys

import pytest

from aegaeon.config import Settings
from aegaeon.engine.open import open_engine
from aegaeon.models.references import resolve
from aegaeon.types import Decode, Load, Loaded, Prefill, SamplingParams
from tests.support.checkpoints import make_checkpoint
from tests.support.decoder import make_request

SETTINGS = Settings(model_cache_budget_gb=0.1, kv_budget_gb=0.05, threads_per_instance=1)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, seed=3)


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    families = ("llama", "qwen2", "qwen3")
    paths = [make_checkpoint(root / family, family, seed=i) for i, family in enumerate(families)]
    return tuple(resolve(str(path), str(root)) for path in paths)


def run(specs, requests):
    engine = open_engine(SETTINGS, specs)
    for spec in specs:
        assert isinstance(engine.load(Load(spec.id)), Loaded)
    tokens = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    running = {}
    for spec in specs:
        mine = tuple(request.id for request in requests if request.model == spec.id)
        if mine:
            running[spec.id] = list(mine)
            take(engine.execute(Prefill(spec.id, mine)), tokens, running)
    while any(running.values()):
        for model in specs:
            if running.get(model.id):
                take(engine.execute(Decode(model.id, tuple(running[model.id]))), tokens, running)
    engine.close()
    return tokens


def take(outcome, tokens, running):
    for token in outcome.tokens:
        tokens[token.request_id].append(token.token_id)
        if token.finish_reason:
            running[outcome.model].remove(token.request_id)


def test_interleaved_models_give_the_tokens_of_each_alone(specs):
    requests = [
        make_request(
            f"{spec.id} {i}",
            [(7 * k + i) % 300 + 3 for k in range(length)],
            model=spec.id,
            sampling=(SamplingParams(temperature=0.0), SAMPLED)[i % 2],
            max_tokens=10,
        )
        for spec in specs
        for i, length in enumerate((5, 130, 33))
    ]
    together = run(specs, requests)
    assert len({tuple(tokens) for tokens in together.values()}) == len(requests)
    for request in requests:
        assert run(specs, [request])[request.id] == together[request.id], request.id


POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
BUSY = """
import os, sys, threading, time
import torch
from tests.support.decoder import *
from aegaeon.types import Prefill, Decode

threads = int(sys.argv[1])
specs = tuple(make_spec(model) for model in SHAPES)
budgets = Budgets(weight_bytes=4 << 20, kv_bytes=64 << 20, threads=threads)
engine = ModelEngine(specs, SHAPES, CpuDevice(), budgets, load_tiny)
load_in_thread(engine, "a")

def work():
    ids = tuple(f"r{i}" for i in range(8))
    for name in ids:
        engine.submit(make_request(name, [1 + k % 90 for k in range(100)], max_tokens=150))
    engine.execute(Prefill("a", ids))
    assert torch.get_num_threads() == threads
    started, cpu = time.perf_counter(), time.process_time()
    for k in range(20):
        engine.execute(Decode("a", ids))
        if k == 5:
            tasks = len(os.listdir("/proc/self/task"))
            for model in "bb":
                load_in_thread(engine, model)
    assert len(os.listdir("/proc/self/task")) == tasks, "a second OpenMP team"
    ratio = (time.process_time() - cpu) / (time.perf_counter() - started)
    assert ratio < threads + 0.2, ratio

lane = threading.Thread(target=work)
lane.start()
lane.join()
print("ended well")
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_an_engine_uses_the_threads_it_was_given(threads):
    environ = os.environ | dict.fromkeys(POOLS, str(threads))
    command = [sys.executable, "-c", BUSY, str(threads)]
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Exception" not in done.stderr, done.stderr
    assert done.stdout == "ended well\n", done.stdout

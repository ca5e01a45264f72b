"""The engine as a server opens it: checkpoints of every family, two models at once, threads."""

import json
import random
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from aegaeon.config import Settings
from aegaeon.engine.open import open_engine
from aegaeon.models.references import resolve
from aegaeon.types import Load, LoadFailed, SamplingParams
from tests.support.checkpoints import make_checkpoint
from tests.support.decoder import load_in_thread, make_request
from tests.support.regions import own_regions
from tests.support.runner import Runner

SETTINGS = Settings(model_cache_budget_gb=0.1, kv_budget_gb=0.05, threads_per_instance=1)
STAGED = {"device": "staged", "device_memory_gb": 0.06, "link_gb_per_s": 0.2}
DEVICES = {"cpu": {}, "staged": STAGED}
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, seed=3)
# Holds any one of the requests, not all.
SHORT_KV_GB = 0.00015


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    families = ("llama", "qwen2", "qwen3")
    paths = [make_checkpoint(root / family, family, seed=i) for i, family in enumerate(families)]
    return tuple(resolve(str(path), str(root)) for path in paths)


def mixed_requests(specs, known=None, choose=None):
    """Three requests of each model; those with `known` tokens resume behind some of them."""
    requests = []
    for spec in specs:
        for i, length in enumerate((5, 130, 33)):
            name = f"{spec.id} {i}"
            requests.append(
                make_request(
                    name,
                    [(7 * k + i) % 300 + 3 for k in range(length)],
                    model=spec.id,
                    sampling=(SamplingParams(temperature=0.0), SAMPLED)[i % 2],
                    max_tokens=10,
                    generated_token_ids=(
                        tuple(known[name][: choose.randint(0, 9)]) if known else ()
                    ),
                )
            )
    return requests


@contextmanager
def opened(settings, specs):
    with own_regions() as regions:
        engine = open_engine(settings, specs, regions)
        try:
            yield engine
        finally:
            engine.close()


@pytest.fixture(scope="module")
def alone(specs):
    tokens = {}
    with opened(SETTINGS, specs) as engine:
        for spec in specs:
            load_in_thread(engine, spec.id)
        for request in mixed_requests(specs):
            runner = Runner(engine)
            runner.submit(request)
            tokens |= runner.finish()
    assert len({tuple(line) for line in tokens.values()}) == len(tokens)
    return tokens


def resume_among_mates(specs, known, seed, threads=1, **changes):
    """Resume all requests at random points, in random batches, models evicted between steps;
    return all tokens of each, and how many lost their KV."""
    choose = random.Random(seed)
    requests = mixed_requests(specs, known, choose)
    choose.shuffle(requests)
    chosen = msgspec.structs.replace(SETTINGS, threads_per_instance=threads, **changes)
    with opened(chosen, specs) as engine:
        for spec in specs:
            load_in_thread(engine, spec.id)
        runner = Runner(engine)
        runner.submit(*requests)

        def between(model):
            if choose.random() < 0.2:
                engine.load(Load(choose.choice(specs).id, evict=(model,)))
                load_in_thread(engine, model)

        tokens = runner.finish(choose, between)
    whole = {r.id: [*r.generated_token_ids, *tokens[r.id]] for r in requests}
    return whole, runner.preempted


def test_tokens_are_the_same_resumed_evicted_and_short_of_blocks(device, specs, alone):
    changes, lost = DEVICES[device], 0
    for seed in range(4):
        assert resume_among_mates(specs, alone, seed, **changes) == (alone, 0)
        short = changes | {"kv_budget_gb": SHORT_KV_GB}
        tokens, preempted = resume_among_mates(specs, alone, seed, **short)
        assert tokens == alone
        lost += preempted
    # A staged device may have room on the host for all that its own memory has not.
    assert lost > 0 or device == "staged"


RESUME = """
import json, sys
from aegaeon.types import ModelSpec
from tests.engine.test_checkpoints import resume_among_mates
import msgspec

specs, known = msgspec.json.decode(sys.stdin.read(), type=tuple[tuple[ModelSpec, ...], dict])
tokens, _ = resume_among_mates(specs, known, seed=1, threads=int(sys.argv[1]))
print(json.dumps(tokens))
"""


def test_another_process_with_other_threads_continues_with_the_same_tokens(specs, alone):
    threads = 2
    done = subprocess.run(
        [sys.executable, "-c", RESUME, str(threads)],
        input=msgspec.json.encode((specs, alone)),
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == alone


def test_a_checkpoint_lost_and_repaired_fails_only_its_own_loads(device, specs, alone, tmp_path):
    moved = tuple(
        msgspec.structs.replace(spec, path=str(tmp_path / Path(spec.path).name)) for spec in specs
    )
    for spec in specs:
        shutil.copytree(spec.path, tmp_path / Path(spec.path).name)
    with opened(msgspec.structs.replace(SETTINGS, **DEVICES[device]), moved) as engine:
        weights = Path(moved[0].path) / "model.safetensors"
        whole = weights.read_bytes()
        other = specs[1].id
        runner = Runner(engine)
        load_in_thread(engine, other)
        for damaged in (None, whole[: len(whole) // 2], b"", whole[:8] + b"x" * (len(whole) - 8)):
            if damaged is None:
                weights.unlink()
            else:
                weights.write_bytes(damaged)
            outcome = engine.load(Load(specs[0].id))
            assert isinstance(outcome, LoadFailed) and outcome.code == "checkpoint_error", outcome
            assert "\n" not in outcome.message
        runner.submit(*(r for r in mixed_requests(specs) if r.model == other))
        weights.write_bytes(whole)
        load_in_thread(engine, specs[0].id)
        runner.submit(*(r for r in mixed_requests(specs) if r.model == specs[0].id))
        assert runner.finish().items() <= alone.items()


BUSY = """
import os, sys, threading, time
import torch
from tests.support.decoder import *
from aegaeon.types import Prefill, Decode

threads = int(sys.argv[1])
engine = make_engine(kv_bytes=64 << 20, load=False, threads=threads)
load_in_thread(engine, "a")

def tasks():
    return len(os.listdir("/proc/self/task"))

def work():
    ids = tuple(f"r{i}" for i in range(8))
    for name in ids:
        engine.submit(make_request(name, [1 + k % 90 for k in range(100)], max_tokens=150))
    engine.execute(Prefill("a", ids))
    started, cpu = time.perf_counter(), time.process_time()
    for k in range(20):
        engine.execute(Decode("a", ids))
        if k == 5:
            before = tasks()
            for model in "bb":
                load_in_thread(engine, model)
    give_up_s = time.monotonic() + 30
    while tasks() > before:  # who has been joined may take a while to be gone
        assert time.monotonic() < give_up_s, "a second team of threads"
        time.sleep(0.01)
    ratio = (time.process_time() - cpu) / (time.perf_counter() - started)
    assert ratio < threads + 0.2, ratio

lane = threading.Thread(target=work)
lane.start()
lane.join()
print("ended well")
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_an_engine_uses_the_threads_it_was_given(threads):
    command = [sys.executable, "-c", BUSY, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "Exception" not in done.stderr, done.stderr
    assert done.stdout == "ended well\n", done.stdout

"""Tokens are those of an undisturbed run, whatever befalls weights and KV, on either device."""

import functools
import random
from collections import Counter
from contextlib import ExitStack

import pytest
import torch

from aegaeon.config import Settings
from aegaeon.engine.open import OPENERS, open_engine
from aegaeon.models.references import resolve
from aegaeon.types import SamplingParams
from tests.support.checkpoints import make_checkpoint
from tests.support.cuda_stand_in import LAZY, RANDOM, cuda_device, open_beside
from tests.support.decoder import all_kv_bytes, load_in_thread, make_request
from tests.support.regions import own_regions
from tests.support.runner import Runner
from tests.support.whims import Whims

GB = 1e9
MODELS = {
    "ada": ("llama", {}),
    "bob": ("qwen2", {"num_key_value_heads": 1}),
    "cleo": ("qwen3", {}),
    "dora": ("llama", {"num_hidden_layers": 3, "num_key_value_heads": 1}),
    "emil": ("qwen3", {"num_attention_heads": 6, "tie_word_embeddings": False}),
}
DTYPES = (torch.float32, torch.bfloat16)
KINDS = ("none", "int8", "none", "none", "none")
GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=11)
LENGTHS = (3, 47, 110)
# Less than half of what the requests of one engine take; of device and of host each.
KV_GB = {"float32": 0.00015, "bfloat16": 0.000075}
# Fewer than there are: the engines take room in the cache from each other.
CACHED_MODELS = 3.0
DEVICE_MODELS = 2.3
# A model takes ten milliseconds and more: longer than a step, shorter than a turn.
LINK_GB_PER_S = 0.03
SEEDS = 3


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [
        make_checkpoint(root / name, family, seed=seed, dtype=DTYPES[seed % 2], **changes)
        for seed, (name, (family, changes)) in enumerate(MODELS.items())
    ]


@pytest.fixture(scope="module")
def specs_of(paths):
    """The models with keys and values of a type, some with int8 weights; the same files in both
    types of weights, in one cache."""

    def specs(kv_dtype):
        kinds = zip(paths, KINDS, strict=True)
        one_each = (resolve(str(path), path.parent, kv_dtype, kind) for path, kind in kinds)
        again = resolve(f"cleo8={paths[2]}", paths[2].parent, kv_dtype, "int8")
        return (*one_each, again)

    return specs


def requests_of(specs, prefix=""):
    return [
        make_request(
            f"{prefix}{spec.id} {i}",
            [(11 * k + 5 * i) % 300 + 3 for k in range(length)],
            model=spec.id,
            sampling=(GREEDY, SEEDED)[i % 2],
            max_tokens=9 + i,
        )
        for spec in specs
        for i, length in enumerate(LENGTHS)
    ] + [
        # Begins as another one does, and may find what that has left.
        make_request(
            f"{prefix}{spec.id} again",
            [*((11 * k + 10) % 300 + 3 for k in range(90)), *range(3, 30)],
            model=spec.id,
            sampling=SEEDED,
            max_tokens=8,
        )
        for spec in specs
    ]


@pytest.fixture(scope="module")
def undisturbed(specs_of):
    """Made once for each type of keys and values, and of activations."""
    return functools.cache(lambda kv_dtype: run_undisturbed(specs_of(kv_dtype), kv_dtype))


def run_undisturbed(specs, kv_dtype):
    tokens = {}
    settings = Settings(
        model_cache_budget_gb=0.05,
        kv_budget_gb=0.05,
        threads_per_instance=1,
        kv_dtype=kv_dtype,
        activation_dtype=kv_dtype,
    )
    with own_regions() as regions:
        engine = open_engine(settings, specs, regions)
        for request in requests_of(specs):
            load_in_thread(engine, request.model)
            runner = Runner(engine)
            runner.submit(request)
            tokens |= runner.finish()
        engine.close()
    # Of the same files in two types, tokens may well be the same.
    apart = [tuple(line) for name, line in tokens.items() if not name.startswith("cleo8")]
    assert len(set(apart)) == len(apart)
    return tokens


def settings_of(device, specs, kv_dtype):
    largest_gb = max(spec.weight_bytes for spec in specs) / GB
    kv_gb = KV_GB[kv_dtype]
    return Settings(
        kv_dtype=kv_dtype,
        activation_dtype=kv_dtype,
        device=device,
        colocated_count=2,
        threads_per_instance=1,
        model_cache_budget_gb=CACHED_MODELS * largest_gb,
        kv_budget_gb=kv_gb,
        device_memory_gb=0 if device == "cpu" else kv_gb + DEVICE_MODELS * largest_gb,
        link_gb_per_s=LINK_GB_PER_S,
    )


def disturb(devices, specs, kv_dtype, seed):
    """Return the tokens of all requests, and what happened to them."""
    choose = random.Random(seed)
    with own_regions() as regions, ExitStack() as opened:
        engines = [
            open_engine(settings_of(one, specs, kv_dtype), specs, regions) for one in devices
        ]
        for engine in engines:
            opened.callback(engine.close)
        whims = Whims(engines, [spec.id for spec in specs], choose)
        doomed = requests_of(specs[:2], "doomed ")
        requests = [*requests_of(specs), *doomed]
        choose.shuffle(requests)
        whims.submit(*requests)
        whims.finish([request.id for request in doomed])
        assert [all_kv_bytes(engine) for engine in engines] == [0, 0]
        for engine in engines:
            moved = engine.usage().moved
            whims.did |= {"kv_out": moved["kv_out"].count, "kv_in": moved["kv_in"].count}
            whims.did["found"] += engine.usage().found_tokens
    for request in doomed:
        del whims.tokens[request.id]
    return whims.tokens, whims.did


@pytest.mark.parametrize(
    ("kv_dtype", "devices"),
    [
        ("float32", ("cpu", "cpu")),
        ("float32", ("staged", "staged")),
        ("float32", ("cpu", "staged")),
        ("bfloat16", ("cpu", "staged")),
    ],
)
def test_tokens_are_those_of_an_undisturbed_run(kv_dtype, devices, specs_of, undisturbed):
    did = Counter()
    for seed in range(SEEDS):
        tokens, ways = disturb(devices, specs_of(kv_dtype), kv_dtype, seed)
        assert tokens == undisturbed(kv_dtype), (seed, ways)
        did += ways
    # What these seeds are there for; each of it happens many times.
    expected = {"preempted", "handed over", "resumed", "cancelled", "begun"}
    expected |= {"prefetch right", "prefetch wrong", "found"}
    if "cpu" in devices:
        expected |= {"evicted by others"}
    if "staged" in devices:
        expected |= {"kv_out", "kv_in"}
    assert expected <= set(+did), did


@pytest.mark.parametrize("order", [LAZY, RANDOM], ids=["lazy", "random"])
def test_so_they_are_when_a_cuda_device_copies(order, specs_of, undisturbed, monkeypatch):
    """On a stand-in for the runtime of CUDA, which copies as late as it may, or at random."""
    monkeypatch.setitem(OPENERS, "cuda", open_beside)
    with cuda_device(order):
        tokens, did = disturb(("cuda:0", "cuda:0"), specs_of("float32"), "float32", seed=order)
    assert tokens == undisturbed("float32")
    assert {"preempted", "handed over", "resumed", "kv_out", "kv_in"} <= set(+did), did

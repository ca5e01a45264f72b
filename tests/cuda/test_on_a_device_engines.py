"""Engines on a CUDA device make the CPU's tokens, whatever befalls weights and KV there: on the
stand-in for one, and on cuda:0."""

import functools
import random
import threading
from contextlib import ExitStack

import pytest

from aegaeon.config import Settings
from aegaeon.engine.open import open_engine
from aegaeon.models.references import resolve
from aegaeon.types import Decode, Load, Loaded, Prefill, SamplingParams, Switch
from tests.support.checkpoints import make_checkpoint
from tests.support.decoder import all_kv_bytes, load_in_thread, make_request
from tests.support.regions import own_regions
from tests.support.runner import Runner
from tests.support.whims import Whims

GB = 1e9
# Of heads that the kernels have. The third has biases, the fourth norms of queries and keys.
WIDTHS = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64}
MODELS = {
    "ada": ("llama", {}),
    "bob": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "cleo": ("qwen2", {"num_key_value_heads": 1}),
    "dora": ("qwen3", {}),
}
GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=11)
LENGTHS = (3, 47, 110)
# Less than half of what the requests of one engine take; of device and of host each.
SCARCE_KV_GB = 0.0006
# Fewer than there are.
DEVICE_MODELS = 2.3


@pytest.fixture(scope="module")
def specs_of(tmp_path_factory):
    """The models with keys and values of a type."""
    root = tmp_path_factory.mktemp("models")
    paths = [
        make_checkpoint(root / name, family, seed=ord(name[0]), **WIDTHS, **changes)
        for name, (family, changes) in MODELS.items()
    ]
    return lambda kv_dtype: tuple(resolve(str(path), str(root), kv_dtype) for path in paths)


def settings_of(device, specs, kv_dtype="float32", kv_gb=0.02, models=DEVICE_MODELS):
    largest_gb = max(spec.weight_bytes for spec in specs) / GB
    return Settings(
        device=device,
        kv_dtype=kv_dtype,
        colocated_count=2,
        threads_per_instance=1,
        model_cache_budget_gb=5 * largest_gb,
        kv_budget_gb=kv_gb,
        device_memory_gb=0 if device == "cpu" else kv_gb + models * largest_gb,
    )


def requests_of(specs, prefix=""):
    return [
        make_request(
            f"{prefix}{spec.id} {i}",
            [(11 * k + 5 * i) % 300 + 3 for k in range(length)],
            model=spec.id,
            sampling=(GREEDY, SEEDED)[i % 2],
            max_tokens=6 + i,
        )
        for spec in specs
        for i, length in enumerate(LENGTHS)
    ]


def alone(device, specs, kv_dtype="float32"):
    """Return the tokens of each request when nothing disturbs it."""
    tokens = {}
    with own_regions() as regions:
        engine = open_engine(settings_of(device, specs, kv_dtype), specs, regions)
        before = ()
        for spec in specs:
            assert isinstance(engine.load(Load(spec.id, evict=before)), Loaded)
            before = (spec.id,)
            for request in requests_of((spec,)):
                runner = Runner(engine)
                runner.submit(request)
                tokens |= runner.finish()
                assert runner.failures == {}
        engine.close()
    return tokens


@pytest.fixture(scope="module")
def make_on_cpu(specs_of):
    return functools.cache(lambda: alone("cpu", specs_of("float32")))


@pytest.fixture
def on_cpu(cuda, make_on_cpu):
    """Made once, and not where there is no device to compare with."""
    return make_on_cpu()


def test_tokens_are_the_cpus_and_models_need_no_change(cuda, specs_of, on_cpu):
    assert alone("cuda:0", specs_of("float32")) == on_cpu


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16"])
def test_tokens_are_the_same_in_any_company_with_smaller_keys_and_values(cuda, specs_of, kv_dtype):
    specs = specs_of(kv_dtype)
    assert specs[0].kv_token_bytes * 2 == specs_of("float32")[0].kv_token_bytes
    expected = alone("cuda:0", specs, kv_dtype)
    with own_regions() as regions:
        engine = open_engine(settings_of("cuda:0", specs, kv_dtype), specs, regions)
        runner, before = Runner(engine), ()
        for spec in specs:
            assert isinstance(engine.load(Load(spec.id, evict=before)), Loaded)
            before = (spec.id,)
            runner.submit(*requests_of((spec,)))
            runner.finish()
        engine.close()
    assert runner.tokens == expected and runner.failures == {}


@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_the_same_whatever_befalls_weights_and_kv(cuda, specs_of, on_cpu, seed):
    """Two engines of one device, of which neither has room for all models nor for all KV: models
    come and go while others compute, KV goes out and in, requests are cancelled, and handed over
    from engine to engine."""
    specs, choose = specs_of("float32")[seed % 2 :][:3], random.Random(seed)
    settings = settings_of("cuda:0", specs, kv_gb=SCARCE_KV_GB)
    with own_regions() as regions, ExitStack() as opened:
        engines = [open_engine(settings, specs, regions) for _ in range(2)]
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
    doomed_ids = {request.id for request in doomed}
    tokens = {name: line for name, line in whims.tokens.items() if name not in doomed_ids}
    assert tokens == {name: on_cpu[name] for name in tokens}
    expected = {"handed over", "resumed", "cancelled", "kv_out", "kv_in"}
    assert expected <= set(+whims.did), whims.did
    assert whims.did["prefetch right"] + whims.did["prefetch wrong"] > 0


def test_a_model_comes_in_while_another_one_computes(cuda, specs_of, on_cpu):
    specs = specs_of("float32")
    first, second = specs[0].id, specs[1].id
    with own_regions() as regions:
        engine = open_engine(settings_of("cuda:0", specs), specs, regions)
        load_in_thread(engine, first)
        runner = Runner(engine)
        runner.submit(*requests_of(specs[:2]))
        names = [request.id for request in requests_of(specs[:1])]
        runner.act(Prefill(first, tuple(names)))
        loading = threading.Thread(target=load_in_thread, args=(engine, second))
        loading.start()
        while loading.is_alive() and runner.open[0].startswith(first):
            runner.act(Decode(first, tuple(name for name in names if name in runner.open)))
        loading.join(60)
        # Nothing of it is left for the switch to bring.
        moved = engine.usage().moved["weights"]
        engine.execute(Switch(second))
        runner.finish()
        assert engine.usage().moved["weights"] == moved
        engine.close()
    assert runner.tokens == {name: on_cpu[name] for name in runner.tokens}


def test_models_that_are_dropped_while_they_come_leave_nothing_wrong(cuda, specs_of, on_cpu):
    specs = specs_of("float32")
    with own_regions() as regions:
        engine = open_engine(settings_of("cuda:0", specs, models=1.2), specs, regions)
        before = ()
        for turn in range(12):
            spec = specs[turn % len(specs)]
            assert isinstance(engine.load(Load(spec.id, evict=before)), Loaded)
            before = (spec.id,)
        for spec in specs:
            assert isinstance(engine.load(Load(spec.id, evict=before)), Loaded)
            before = (spec.id,)
            runner = Runner(engine)
            runner.submit(*requests_of((spec,)))
            assert runner.finish() == {name: on_cpu[name] for name in runner.tokens}
        engine.close()


def test_kv_that_leaves_the_device_comes_back_the_same(cuda, specs_of, on_cpu):
    """Two models take turns after every token, and the device has room for one's KV."""
    specs = specs_of("float32")[:2]
    with own_regions() as regions:
        engine = open_engine(settings_of("cuda:0", specs, kv_gb=SCARCE_KV_GB), specs, regions)
        for spec in specs:
            load_in_thread(engine, spec.id)
        runner = Runner(engine)
        runner.submit(*requests_of(specs))
        for turn in range(100):
            model = specs[turn % 2].id
            mine = tuple(name for name in runner.open if runner.models[name] == model)
            if mine:
                engine.execute(Switch(model))
                runner.act(Decode(model, mine))
        moved = engine.usage().moved
        assert runner.open == [] and all_kv_bytes(engine) == 0
        assert moved["kv_out"].count > 0 and moved["kv_in"].count > 0
        engine.close()
    assert runner.tokens == {name: on_cpu[name] for name in runner.tokens}

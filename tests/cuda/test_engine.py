"""Models on cuda:0 to the end, where this host stands in for the device: its memory and copies by a
stand-in for the runtime, its kernels on their emulation, torch's products on the CPU."""

import json
from functools import partial

import msgspec
import pytest
import torch
from llguidance import LLMatcher

from aegaeon import _native
from aegaeon.config import Settings
from aegaeon.device.cuda import CudaOperators
from aegaeon.device.products import view_of
from aegaeon.engine import cuda as engine_cuda
from aegaeon.engine.cuda import on_device, open_cuda_engine
from aegaeon.engine.open import open_engine
from aegaeon.engine.own_memory import open_on
from aegaeon.engine.shared import Compute
from aegaeon.errors import BudgetTooSmall, ConfigError, DeviceError, UnsupportedModel
from aegaeon.memory.cuda_room import room_bytes
from aegaeon.models.config import read_config
from aegaeon.models.references import resolve
from aegaeon.types import Load, Loaded, SamplingParams
from benchmark import cuda_copies, device_limits, switch
from benchmark import engine as engine_benchmark
from benchmark.device_limits import DeviceProbe
from benchmark.staged_switches import Link
from tests.support.checkpoints import make_checkpoint
from tests.support.cuda_products import HostProducts, host_view
from tests.support.cuda_stand_in import EAGER, LAZY, RANDOM, stand_in
from tests.support.cuda_steps import on_stand_in
from tests.support.decoder import make_request
from tests.support.regions import own_regions
from tests.support.runner import Runner
from tests.support.smollm2 import smollm2_directory

# Of heads that the kernels have. The third has biases, the fourth norms of queries and keys.
WIDTHS = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64}
MODELS = {
    "ada": ("llama", {}),
    "bob": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "cleo": ("qwen2", {"num_key_value_heads": 1}),
    "dora": ("qwen3", {}),
}
KV_GB = 0.02
SEEDED = SamplingParams(temperature=0.7, seed=5)


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = (
        make_checkpoint(root / name, family, seed=ord(name[0]), **WIDTHS, **changes)
        for name, (family, changes) in MODELS.items()
    )
    return tuple(resolve(str(path), str(root)) for path in made)


@pytest.fixture
def emulated(monkeypatch):
    with on_stand_in(EAGER, monkeypatch) as module:
        yield module


def open_emulated(settings, specs, regions, opened=None):
    """Open as the server does; `opened` is given what computes."""
    device = _native.CudaDevice(settings.cuda_number)
    room = room_bytes((read_config(spec.path) for spec in specs), settings.max_batch)
    operators = CudaOperators(device, HostProducts(stand_in()), room)
    if opened is not None:
        opened.append(operators)
    compute = Compute(lambda *_: operators, layout="rows", pins=device)
    return open_on(on_device(device, host_view, compute), settings, specs, regions)


def settings_of(device, specs, models=2.5):
    largest_gb = max(spec.weight_bytes for spec in specs) / 1e9
    return Settings(
        device=device,
        threads_per_instance=1,
        model_cache_budget_gb=5 * largest_gb,
        kv_budget_gb=KV_GB,
        device_memory_gb=KV_GB + models * largest_gb if device != "cpu" else 0,
    )


def tokens_of(engine, specs, prompt=(3, 5, 8, 13), count=4):
    runner, before = Runner(engine), ()
    for spec in specs:
        assert isinstance(engine.load(Load(spec.id, evict=before)), Loaded)
        before = (spec.id,)
        for name, sampling in (("greedy", SamplingParams(temperature=0.0)), ("seeded", SEEDED)):
            runner.submit(
                make_request(
                    f"{spec.id} {name}", list(prompt), spec.id, sampling=sampling, max_tokens=count
                )
            )
        runner.finish()
    engine.close()
    assert runner.failures == {}
    return runner.tokens


def on_cpu(specs):
    with own_regions() as regions:
        return tokens_of(open_engine(settings_of("cpu", specs), specs, regions), specs)


def test_tokens_are_the_cpus_and_models_need_no_change(emulated, specs):
    settings = settings_of("cuda:0", specs)
    with own_regions() as regions:
        engine = open_emulated(settings, specs, regions)
        assert tokens_of(engine, specs) == on_cpu(specs)


@pytest.mark.parametrize(("order", "seed"), [(EAGER, 1), (LAZY, 1), (RANDOM, 1), (RANDOM, 2)])
def test_tokens_are_the_same_with_graphs_that_are_kept_across_switches(
    order, seed, specs, monkeypatch
):
    """Models that come back where they were, and elsewhere, in batches of changing sizes."""
    # The first and the third lie where the other was; the second lies between, sometimes.
    turns = [specs[at] for at in (0, 1, 0, 1, 2, 0, 2, 1, 0)]
    found, graphs = [], []
    for is_graphed in (True, False):
        opened = []
        with on_stand_in(order, monkeypatch, seed), own_regions() as regions:
            settings = settings_of("cuda:0", specs)
            engine = open_emulated(settings, specs, regions, opened)
            if not is_graphed:
                opened[0].graphs.refuse("by a test")
            found.append(tokens_of_turns(engine, turns))
            graphs.append((opened[0].graphs.launched, len(opened[0].graphs)))
            del engine, opened
    assert found[0] == found[1]
    assert graphs[0][0] > 60 and graphs[0][1] >= 6 and graphs[1] == (0, 0)


def tokens_of_turns(engine, turns):
    runner, here = Runner(engine), ()
    for turn, spec in enumerate(turns):
        away = tuple(name for name in here if name != spec.id)[-1:]
        assert isinstance(engine.load(Load(spec.id, evict=away)), Loaded)
        here = (*(name for name in here if name not in (*away, spec.id)), spec.id)
        for at in range(1 + turn % 3):
            prompt = [3 + turn, 5 + at, 8, 13]
            request = make_request(f"{turn} {at}", prompt, spec.id, max_tokens=6 + 3 * at)
            runner.submit(request)
        runner.finish()
    engine.close()
    assert runner.failures == {}
    return runner.tokens


def drawn_by(engine, spec, **kinds):
    """Tokens, and log-probabilities of tokens and prompts, of requests with these kinds of draw."""
    assert isinstance(engine.load(Load(spec.id)), Loaded)
    runner = Runner(engine)
    for name, params in kinds.items():
        request = make_request(name, [3, 5, 8, 13], spec.id, sampling=params, max_tokens=5)
        runner.submit(msgspec.structs.replace(request, stop_token_ids=(2,)))
    runner.finish()
    engine.close()
    assert runner.failures == {}
    values = [one.log_prob for told in (*runner.log_probs.values(), *runner.scores.values())
              for one in told if one is not None]  # fmt: skip
    return runner.tokens, values


def test_changed_logits_and_log_probabilities_are_the_cpus(emulated, specs):
    digits = LLMatcher.grammar_from_regex("[0-9]+")
    kinds = {
        "plain": SEEDED,
        "penalised": SamplingParams(temperature=0.7, seed=5, frequency_penalty=2.0),
        "biased": SamplingParams(temperature=0.0, logit_bias=((7, 100.0),), logprobs=2),
        "held": SamplingParams(temperature=0.7, seed=5, grammar=digits),
        "scored": SamplingParams(temperature=0.0, prompt_logprobs=1),
    }
    found = []
    for name, opener in (("cpu", open_engine), ("cuda:0", open_emulated)):
        with own_regions() as regions:
            engine = opener(settings_of(name, specs), specs, regions)
            found.append(drawn_by(engine, specs[0], **kinds))
    (tokens, values), (device_tokens, device_values) = found
    assert tokens == device_tokens
    assert tokens["biased"] == [7] * 5
    assert len(values) == 5 + 3
    assert device_values == pytest.approx(values, abs=0.05)  # products round otherwise


def test_a_real_model_makes_its_first_token(emulated):
    path = smollm2_directory()
    specs = (resolve(str(path), str(path.parent)),)
    prompt = make_request("x", [1, 198, 30, 40], specs[0].id).prompt_token_ids
    found = []
    for name in ("cpu", "cuda:0"):
        settings = settings_of(name, specs, models=1.1)
        with own_regions() as regions:
            opener = open_engine if name == "cpu" else open_emulated
            engine = opener(settings, specs, regions)
            found.append(tokens_of(engine, specs, prompt, count=1))
    assert found[0] == found[1]


def test_more_memory_than_the_device_has_is_refused_with_the_numbers(emulated, specs):
    settings = settings_of("cuda:0", specs, models=100_000)
    with own_regions() as regions, pytest.raises(BudgetTooSmall, match=r"free of 1\.074 GB"):
        open_emulated(settings, specs, regions)


def test_int8_weights_are_refused(emulated, specs):
    eighths = tuple(resolve(spec.path, ".", "auto", "int8") for spec in specs[:1])
    settings = settings_of("cuda:0", eighths)
    with own_regions() as regions, pytest.raises(ConfigError, match="--quantize none"):
        open_cuda_engine(settings, eighths, regions)


def test_heads_that_the_kernels_do_not_have_are_refused(tmp_path):
    specs = (resolve(str(make_checkpoint(tmp_path / "small")), str(tmp_path)),)
    with own_regions() as regions, pytest.raises(UnsupportedModel, match="heads of 16"):
        open_cuda_engine(settings_of("cuda:0", specs), specs, regions)


def test_a_torch_without_cuda_is_told(emulated):
    if torch.cuda.is_available():
        pytest.skip("this torch has CUDA")
    with pytest.raises(DeviceError, match="install a torch built for CUDA"):
        view_of(_native.CudaDevice(0).allocate(4096))


def test_cuda_without_a_device_says_why(specs):
    """By the real runtime, or by a build without CUDA."""
    if _native.has_cuda and _has_device():
        pytest.skip("there is a device")
    with own_regions() as regions, pytest.raises(DeviceError, match="or serve with --device cpu"):
        open_engine(settings_of("cuda:0", specs), specs, regions)


def _has_device():
    try:
        return _native.count_cuda_devices() > 0
    except DeviceError:
        return False


def test_the_benchmark_of_copies_runs(emulated, capsys):
    cuda_copies.main(["--quick", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["unit"] for row in rows] == ["GB/s"] * 4 and all(row["ours"] > 0 for row in rows)


@pytest.fixture
def served(emulated, monkeypatch):
    """What the server opens on cuda:0, where benchmarks look for it."""
    place = torch.device("cpu")
    monkeypatch.setattr(engine_cuda, "view_of", host_view)
    products = HostProducts(emulated)
    monkeypatch.setattr(engine_cuda, "CudaOperators", partial(CudaOperators, products=products))
    monkeypatch.setattr(device_limits, "check_torch", lambda: None)
    monkeypatch.setattr(
        engine_benchmark, "DeviceProbe", lambda _, pace, __: DeviceProbe(place, pace, 1 << 20)
    )


def run_benchmark(benchmark, tmp_path, capsys):
    benchmark.main(["--quick", "--json", "--device", "cuda:0", "--dir", str(tmp_path)])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(row["ours"] > 0 for row in rows)
    return rows


def test_the_benchmark_of_engines_runs(served, tmp_path, capsys):
    rows = run_benchmark(engine_benchmark, tmp_path, capsys)
    cases = [row["case"] for row in rows if row["case"].startswith("bf16 x bf16")]
    for case in ("prefill of 70", "decode, batch 8, context 40"):
        found = [f"bf16 x bf16, {case}{part}" for part in ("", ": read", ": computed")]
        assert found[0] in cases and len(set(found) & set(cases)) == 2
    assert all(row["limit"] > 0 for row in rows if row["unit"] == "tokens/s")


@pytest.mark.thorough
def test_the_benchmark_of_switches_runs(served, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(switch, "link_gb_per_s", lambda _: 4.0)
    monkeypatch.setattr(switch, "cuda_link", lambda device, rate: Link(device, rate, 256))
    rows = run_benchmark(switch, tmp_path, capsys)
    assert list(dict.fromkeys(row["case"].partition(",")[0] for row in rows)) == [
        "limit: torch's copies of page-locked memory to cuda:0",
        "warm switch on cuda:0",
        "cuda:0 switch",
        "share of a prefetch hidden",
        "a step of decoding beside the copy",
        "KV out",
        "KV in",
    ]

"""A recorded step gives the bits of its operators one by one, whatever befalls it."""

import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aegaeon import _native
from aegaeon.device.base import Device, OneByOne, Step, StepRunner
from aegaeon.device.cpu import CpuDevice
from aegaeon.device.recorder import record
from aegaeon.errors import LoadCancelled, WeightsEvicted
from aegaeon.memory.kv import KvShape
from aegaeon.memory.workspace import MAX_PASS_ROWS, pass_bytes, step_floats
from aegaeon.models import layers
from aegaeon.models.checkpoint import plan_load
from aegaeon.models.config import ModelConfig
from aegaeon.models.layers import Decoder
from aegaeon.models.packing import PackPlan, plan_pack
from aegaeon.models.weights import PackedWeights, read_weights
from tests.support.checkpoints import VOCAB_TOKENS, make_checkpoint
from tests.support.coming import Coming
from tests.support.eager import EagerCpu
from tests.support.paged import PagedSequences
from tests.support.unread import SIZES, Unread, config_of

VARIANTS = {
    "llama": ("llama", {}),
    "llama untied with biases": (
        "llama",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "llama with its own head_dim": ("llama", {"head_dim": 24, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"intermediate_size": 75}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False, "num_hidden_layers": 3}),
    "qwen3": ("qwen3", {}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
}
# Sequences in a pass, as (tokens before, rows): of 1, 2, 17 and 64 rows in all.
PASSES = (((0, 1),), ((33, 1), (5, 1)), ((0, 15), (16, 1), (40, 1)), ((0, 40), (3, 24)))
WANTED = {"none": 0, "last": 1, "all": None}


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield
    _native.force_isa("best")


def make_plan(directory: Path, name: str = "llama", **changes) -> PackPlan:
    family, overrides = VARIANTS[name]
    made = make_checkpoint(directory, family, dtype=torch.bfloat16, **(overrides | changes))
    return plan_pack(plan_load(made))


class Model:
    """A decoder and sequences of its own; every step is a pass over some of them."""

    def __init__(self, device: Device, weights: PackedWeights, passes=PASSES) -> None:
        self.config: ModelConfig = weights.plan.load_plan.config
        self.decoder = Decoder(self.config, device, weights)
        self.shape = KvShape(self.config.layers, self.config.kv_heads, self.config.head_dim)
        self.parts = [
            [(len(before), start, rows) for before, (start, rows) in prefixes_of(parts)]
            for parts in passes
        ]
        lengths = [max(s + r for parts in passes for s, r in parts)] * max(map(len, passes))
        self.sequences = PagedSequences(self.shape, lengths)
        self.sequences.pool.pages(self.shape).normal_(generator=torch.Generator().manual_seed(5))

    def step(self, at: int, wanted: int | None = None) -> Tensor:
        batch = self.sequences.batch(self.parts[at])
        rows = len(batch.positions)
        ids = torch.arange(rows) * 37 % VOCAB_TOKENS
        logit_rows = torch.arange(rows)[rows - wanted :] if wanted is not None else None
        return self.decoder.forward(
            replace(
                batch,
                token_ids=ids,
                logit_rows=torch.arange(rows) if logit_rows is None else logit_rows,
            )
        )

    def pages(self) -> Tensor:
        return self.sequences.pool.pages(self.shape)


def prefixes_of(parts):
    return [(parts[:at], part) for at, part in enumerate(parts)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_replay_has_the_bits_of_its_operators(name, threads, tmp_path):
    weights = read_weights(make_plan(tmp_path, name))
    eager, recorded = Model(EagerCpu(), weights), Model(CpuDevice(threads), weights)
    # The largest last, then all again: what is kept of one pass must not show in another.
    for at in (*range(len(PASSES)), *range(len(PASSES))):
        for wanted in WANTED.values():
            expected = eager.step(at, wanted)
            assert torch.equal(recorded.step(at, wanted), expected), (at, wanted)
            assert expected.shape[1] == eager.config.vocab_tokens
    assert torch.equal(recorded.pages(), eager.pages())


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_a_replay_uses_the_instructions_of_now(isa, tmp_path):
    weights = read_weights(make_plan(tmp_path, "qwen3"))
    eager, recorded = Model(EagerCpu(), weights), Model(CpuDevice(), weights)
    assert torch.equal(recorded.step(1), eager.step(1))
    try:
        _native.force_isa(isa)
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    assert torch.equal(recorded.step(2), eager.step(2))


def test_some_of_the_rows_are_wanted_in_any_order(tmp_path):
    weights = read_weights(make_plan(tmp_path, "qwen2"))
    eager, recorded = Model(EagerCpu(), weights), Model(CpuDevice(2), weights)
    whole = eager.step(3)
    batch = recorded.sequences.batch(recorded.parts[3])
    rows = torch.tensor([63, 0, 17, 17, 5])
    ids = torch.arange(64) * 37 % VOCAB_TOKENS
    logits = recorded.decoder.forward(replace(batch, token_ids=ids, logit_rows=rows))
    assert torch.equal(logits, whole[rows])


@pytest.mark.parametrize("row", [-1, 64])
def test_a_row_that_is_none_is_refused(row, tmp_path):
    model = Model(CpuDevice(), read_weights(make_plan(tmp_path)))
    batch = replace(model.sequences.batch(model.parts[3]), logit_rows=torch.tensor([row]))
    with pytest.raises(IndexError, match=f"row {row} of 64"):
        model.decoder.forward(batch)


def test_models_that_share_a_device_leave_each_other_alone(tmp_path):
    device, eager = CpuDevice(2), EagerCpu()
    every = [read_weights(make_plan(tmp_path / str(i), name)) for i, name in enumerate(VARIANTS)]
    models = [(Model(device, weights), Model(eager, weights)) for weights in every]
    for at in (3, 0, 2):
        for recorded, one_by_one in models:
            assert torch.equal(recorded.step(at), one_by_one.step(at))


@pytest.mark.parametrize("tied", [True, False])
def test_a_replay_awaits_each_stage_before_it_computes_with_it(tied, tmp_path):
    """Stages come in only when they are awaited, into memory that is NaN before."""
    coming = Coming(make_plan(tmp_path, tie_word_embeddings=tied))
    recorded, expected = Model(CpuDevice(2), coming.weights), Model(EagerCpu(), coming.whole)
    recorded.decoder.prepare()
    assert not coming.awaited
    assert recorded.step(3, 0).shape == (0, VOCAB_TOKENS)
    expected.step(3, 0)
    assert coming.awaited == [0, 1]
    assert torch.equal(recorded.step(1), expected.step(1))
    assert coming.awaited == [0, 1, 2]
    coming.awaited.append(coming.plan.stages - 1)  # the embedding, or once more the head
    assert torch.equal(recorded.step(2), expected.step(2))
    assert set(coming.awaited[3:]) == {coming.plan.stages - 1}


@pytest.mark.parametrize("error", [WeightsEvicted("gone"), LoadCancelled("not wanted")])
def test_what_keeps_a_stage_from_coming_ends_the_step_and_a_later_one_goes_on(error, tmp_path):
    coming = Coming(make_plan(tmp_path, "qwen3"))
    recorded, expected = Model(CpuDevice(2), coming.weights), Model(EagerCpu(), coming.whole)
    await_stage = coming.await_stage

    def lose(stage: int) -> None:
        if stage == 1:
            raise error
        await_stage(stage)

    coming.await_stage = lose
    with pytest.raises(type(error)) as caught:
        recorded.step(2)
    assert caught.value is error and coming.awaited == [0]
    coming.await_stage = await_stage
    assert torch.equal(recorded.step(2), expected.step(2))
    assert coming.awaited == [0, 1, 2]


def test_a_child_replays_on_a_device_of_its_own(tmp_path):
    weights = read_weights(make_plan(tmp_path))
    expected = Model(CpuDevice(2), weights).step(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking beside threads: theirs are not used there
        child = os.fork()
    if child == 0:
        is_same = False
        try:
            is_same = torch.equal(Model(CpuDevice(2), weights).step(2), expected)
        finally:
            os._exit(0 if is_same else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_a_pass_takes_no_more_than_is_estimated_and_not_much_less(name, tmp_path):
    device = CpuDevice()
    model = Model(device, read_weights(make_plan(tmp_path, name)), (((0, MAX_PASS_ROWS),),))
    model.step(0, 1)
    with device.turn() as (_, workspace):
        assert workspace.bytes <= pass_bytes(model.config) <= 8 * workspace.bytes


class Recorded(CpuDevice):
    """Keeps the plans of the steps that it prepares."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: list[_native.StepPlan] = []

    def new_runner(self) -> StepRunner:
        plans = self.plans

        class Runner(OneByOne):
            def prepare(self, step: Step, hidden: int, head_dim: int) -> None:
                plans.append(record(step, hidden, head_dim, _native.StepPlan()).plan)

        return Runner(self)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("sizes", SIZES)
def test_slots_of_any_shape_take_no_more_than_is_counted(sizes, family, monkeypatch):
    monkeypatch.setattr(layers, "EmbeddingRows", lambda *_: None)
    config = config_of(family, sizes)
    device = Recorded()
    Decoder(config, device, Unread(config)).prepare()
    assert device.plans[0].row_bytes <= 4 * step_floats(config)

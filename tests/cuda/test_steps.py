"""Steps on a CUDA device that the host stands in for: what they compute, by which calls, and that a
row's bits are its own."""

import logging

import pytest
import torch

from aegaeon import _native
from aegaeon.device import products
from aegaeon.device.base import OneByOne
from aegaeon.device.cpu import CpuDevice
from aegaeon.device.cuda import CudaOperators
from aegaeon.device.cuda_graphs import Graphs
from aegaeon.device.recorder import record
from aegaeon.errors import DeviceError
from aegaeon.memory.cuda_room import RoomBytes, cuda_step_floats, room_bytes
from aegaeon.models import layers
from aegaeon.models.checkpoint import plan_load
from aegaeon.models.packing import plan_pack
from aegaeon.models.weights import read_weights
from aegaeon.types import SamplingParams
from tests.support.checkpoints import VOCAB_TOKENS, make_checkpoint
from tests.support.cuda_products import HostProducts
from tests.support.cuda_stand_in import EAGER, LAZY, RANDOM
from tests.support.cuda_steps import WIDTHS, SteppedModel, on_stand_in, operators, row_weights
from tests.support.unread import SIZES, Unread, config_of

ORDERS = [(EAGER, 1), (LAZY, 1), (RANDOM, 1), (RANDOM, 2)]
FORMS = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
}
# Of logits about 1; what is rounded are activations alone.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 6e-3}
LENGTHS = (40, 30, 20, 50)


@pytest.fixture(
    params=ORDERS, ids=lambda order: f"{('eager', 'lazy', 'random')[order[0]]}{order[1]}"
)
def module(request, monkeypatch):
    with on_stand_in(request.param[0], monkeypatch, request.param[1]) as made:
        yield made


@pytest.fixture
def eager(monkeypatch):
    with on_stand_in(EAGER, monkeypatch) as made:
        yield made


def done(device, logits):
    device.compute.device.synchronize()
    return logits.clone()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("form", FORMS)
def test_logits_are_the_cpus_but_for_what_is_rounded(form, dtype, tmp_path, eager):
    family, changes = FORMS[form]
    device = operators(eager)
    model = SteppedModel(device, row_weights(tmp_path, family, dtype, **changes), LENGTHS)
    plan = plan_pack(plan_load(make_checkpoint(tmp_path, family, dtype=dtype, **WIDTHS, **changes)))
    expected = SteppedModel(CpuDevice(), read_weights(plan), LENGTHS)
    for parts in ([(0, 0, 17)], [(0, 17, 1), (1, 0, 9), (2, 0, 1)], [(0, 18, 1), (1, 9, 1)]):
        made, wanted = (one.step(*parts, wanted="all") for one in (model, expected))
        made = done(device, made)
        assert made.shape == wanted.shape and made.shape[1] == VOCAB_TOKENS
        assert (made - wanted).abs().max() <= TOLERANCES[dtype] * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("tile_rows", [1, 4, 128])
def test_a_row_has_its_bits_in_any_company(tile_rows, tmp_path, module):
    weights = row_weights(tmp_path, "qwen3", torch.bfloat16)
    device = operators(module, tile_rows)
    alone, among = (SteppedModel(device, weights, LENGTHS) for _ in range(2))
    expected = [done(device, alone.step((0, 0, 21)))]
    expected += [done(device, alone.step((0, at, 1))) for at in range(21, 26)]
    among.step((1, 0, 5), (0, 0, 8), wanted="none")
    found = [done(device, among.step((3, 0, 40), (0, 8, 13)))[1:]]
    found.append(done(device, among.step((0, 21, 1), (1, 5, 1)))[:1])
    found.append(done(device, among.step((1, 6, 1), (3, 40, 1), (2, 0, 1), (0, 22, 1)))[3:])
    found.append(done(device, among.step((1, 7, 9), (0, 23, 1), (2, 1, 3)))[1:2])
    found.append(done(device, among.step((2, 4, 1), (0, 24, 1), (1, 16, 1)))[1:2])
    found.append(done(device, among.step((2, 5, 1), (0, 25, 1), (1, 17, 1)))[1:2])
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_product_of_a_weight_is_the_same_call_for_any_rows(tmp_path, eager):
    weights = row_weights(tmp_path, "llama", torch.bfloat16)
    device = operators(eager, 8)
    model = SteppedModel(device, weights, LENGTHS)
    for parts in ([(0, 0, 1)], [(0, 1, 30), (1, 0, 9)], [(0, 31, 1), (1, 9, 1), (2, 0, 1)]):
        model.step(*parts, wanted="all")
    shapes = set(device.compute.products.calls)
    # Queries, keys and values in one, and so are gate and up.
    expected = {(256, 128), (128, 128), (2 * 96, 128), (128, 96), (VOCAB_TOKENS, 128)}
    assert {(outputs, inputs) for _, _, outputs, inputs in shapes} == expected
    assert all(rows == 8 and inputs == width for rows, width, _, inputs in shapes)


def test_activations_beyond_float16_stay_finite(tmp_path, eager):
    """Weights whose products make 10^6 of a normed activation."""
    directory = tmp_path / "large"
    weights = row_weights(directory, "llama", torch.float16, num_hidden_layers=1)
    for name in ("v_proj", "o_proj"):
        matrix = weights.matrix(f"model.layers.0.self_attn.{name}.weight")
        first = matrix.address - weights.memory.data_ptr()
        size = matrix.out_features * matrix.in_features * 2
        weights.memory[first : first + size].view(torch.float16).mul_(3000)
    device = operators(eager)
    model = SteppedModel(device, weights, (8,))
    logits = done(device, model.step((0, 0, 8), wanted="all"))
    assert logits.isfinite().all() and logits.abs().max() > 0


def test_steps_are_not_waited_for_and_keep_what_they_were_given(tmp_path, module):
    """More of them than uploads may be under way."""
    weights = row_weights(tmp_path, "llama", torch.float32)
    device = operators(module)
    model, expected = (SteppedModel(device, weights, LENGTHS) for _ in range(2))
    for at in range(0, 39, 3):
        model.step((0, at, 3), wanted="none")
    logits = done(device, model.step((0, 39, 1)))
    for at in range(0, 39, 3):
        done(device, expected.step((0, at, 3), wanted="none"))
    assert torch.equal(logits, done(device, expected.step((0, 39, 1))))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("sizes", SIZES)
def test_slots_of_any_shape_take_no_more_than_is_counted(sizes, family, monkeypatch):
    if not _native.has_cuda:
        pytest.skip("this build has no CUDA")
    monkeypatch.setattr(layers, "EmbeddingRows", lambda *_: None)
    config, plans = config_of(family, sizes), []

    class Recorded(CpuDevice):
        activation_dtype = torch.bfloat16

        def new_runner(self):
            runner = OneByOne(self)
            runner.prepare = lambda *given: plans.append(record(*given, _native.CudaStepPlan()))
            return runner

    layers.Decoder(config, Recorded(), Unread(config)).prepare()
    assert 0 < plans[0].plan.row_bytes <= 4 * cuda_step_floats(config)


def test_a_small_room_for_splits_never_shows(tmp_path, eager):
    weights = row_weights(tmp_path, "llama", torch.bfloat16, max_position_embeddings=1200)
    found = []
    for size in (None, RoomBytes(splits=2 * 66 * 4 * 3, rows=1)):
        device = CudaOperators(_native.CudaDevice(0), HostProducts(eager), size)
        model = SteppedModel(device, weights, (1100, 1100))
        for sequence in range(2):
            for at in (0, 512):
                model.step((sequence, at, 512), wanted="none")
        made = [model.step((0, 1024, 9), (1, 1024, 1)), model.step((0, 1033, 1), (1, 1025, 1))]
        found.append(done(device, made[1]))
        assert size is None or len(device.compute.rooms.splits.view) == size.splits
    assert torch.equal(*found)


def test_rooms_are_as_large_as_steps_ever_need(tmp_path, eager):
    weights = row_weights(tmp_path, "llama", torch.bfloat16, max_position_embeddings=1040)
    config = weights.plan.load_plan.config
    size = room_bytes((config,), 3)
    device = CudaOperators(_native.CudaDevice(0), HostProducts(eager), size)
    rooms = device.compute.rooms
    every = rooms.slots, rooms.result, rooms.upload, rooms.splits, rooms.draws
    before = [room.view.data_ptr() for room in every]
    assert sum(len(room.view) for room in every) == size.total_bytes
    model = SteppedModel(device, weights, (1040, 1040, 1040))
    for sequence in range(3):
        model.step((sequence, 0, 200), wanted="none")
        model.step((sequence, 200, 512), wanted="none")
        model.step((sequence, 1024, 15))
    logits = model.step((0, 1039, 1), (1, 1039, 1), (2, 1039, 1))
    drawn = device.sample(logits, [(SamplingParams(seed=at), 3) for at in range(3)])
    assert all(0 <= token < VOCAB_TOKENS for token in drawn)
    assert [room.view.data_ptr() for room in every] == before


# Graphs


def decode(device, model, counts, start=20):
    """Return the logits of steps of so many sequences each, all of which have `start` tokens."""
    for sequence in range(len(model.sequences.blocks)):
        model.step((sequence, 0, start), wanted="none")
    tokens, logits = [start] * len(LENGTHS), []
    for count in counts:
        parts = [(sequence, tokens[sequence], 1) for sequence in range(count)]
        logits.append(done(device, model.step(*parts)))
        for sequence in range(count):
            tokens[sequence] += 1
    return logits


BATCHES = (1, 1, 1, 3, 2, 4, 3, 3, 4, 1, 2, 2, 2)
LONG = (60, 60, 60, 60)


def compare(module, tmp_path, family="qwen2"):
    """Return graphs that made the same bits as launches, of every step."""
    weights = row_weights(tmp_path, family, torch.bfloat16)
    by_graphs = operators(module)
    by_calls = operators(module)
    by_calls.graphs.refuse("by a test")
    found = decode(by_graphs, SteppedModel(by_graphs, weights, LONG), BATCHES)
    expected = decode(by_calls, SteppedModel(by_calls, weights, LONG), BATCHES)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert by_calls.graphs.launched == 0
    return by_graphs.graphs


def test_graphs_make_the_bits_of_launches(tmp_path, module):
    graphs = compare(module, tmp_path)
    # Of rows 1, 2 and 4; the third time and later of each, but for the first step, before which the
    # weights of the last stage have not been awaited.
    assert len(graphs) == 3 and graphs.launched == len(BATCHES) - 1 - 2 * 3


def test_contexts_of_more_splits_have_graphs_of_their_own(tmp_path, eager):
    weights = row_weights(tmp_path, "llama", torch.float32, max_position_embeddings=2048)
    logits = []
    for is_graphed in (True, False):
        device = operators(eager)
        if not is_graphed:
            device.graphs.refuse("by a test")
        model = SteppedModel(device, weights, (1100, 520))
        for sequence, tokens in ((0, 1024), (1, 505)):
            for at in range(0, tokens, 128):
                model.step((sequence, at, min(128, tokens - at)), wanted="none")
        made = [done(device, model.step((1, 505 + at, 1))) for at in range(12)]
        made += [done(device, model.step((0, 1024 + at, 1))) for at in range(4)]
        logits.append(torch.cat(made))
        if is_graphed:
            assert len(device.graphs) == 3  # 1, 2 and 4 splits
    assert torch.equal(*logits)


def test_a_model_of_the_same_form_at_the_same_place_finds_its_graphs(tmp_path, eager):
    weights = row_weights(tmp_path, "qwen3", torch.bfloat16)
    device = operators(eager)
    first = SteppedModel(device, weights, LONG)
    decode(device, first, (2, 2, 2, 2))
    before = device.graphs.launched, len(device.graphs)
    assert before == (1, 1)
    again = SteppedModel(device, weights, LONG)
    again.sequences = first.sequences
    again.step((0, 24, 1), (1, 24, 1))  # which awaits the weights
    made = done(device, again.step((0, 24, 1), (1, 24, 1)))
    assert (device.graphs.launched, len(device.graphs)) == (2, 1)
    # Other weights there are computed with: a graph holds addresses alone.
    weights.memory.view(torch.bfloat16)[: 1 << 12] *= -1
    assert not torch.equal(made, done(device, again.step((0, 24, 1), (1, 24, 1))))
    moved = SteppedModel(device, row_weights(tmp_path, "qwen3", torch.bfloat16), LONG)
    moved.sequences = first.sequences
    moved.step((0, 24, 1), (1, 24, 1))
    done(device, moved.step((0, 24, 1), (1, 24, 1)))
    assert (device.graphs.launched, len(device.graphs)) == (3, 1)


def test_few_graphs_are_kept(eager):
    device = _native.CudaDevice(0)
    graphs, ran = Graphs(device, most=2), []

    def launch(stream):
        ran.append(stream)

    for key in "aabbccbbaa":
        graphs.run(key, launch)
    assert len(graphs) == 2 and graphs.launched == 2
    # Twice and recorded, of each; "b" was kept, "a" was not.
    assert len(ran) == 4 * 3


def test_a_driver_that_records_nothing_is_named_once(tmp_path, eager, caplog):
    eager.refuse_graphs(True)
    with caplog.at_level(logging.WARNING):
        graphs = compare(eager, tmp_path)
    eager.refuse_graphs(False)
    assert graphs.launched == len(graphs) == 0 and "record a step" in graphs.refusal
    assert sum("cannot record a step" in line for line in caplog.messages) == 1


def test_a_room_that_has_grown_has_other_graphs(tmp_path, eager):
    """What was recorded before would read where nothing is any more."""
    weights = row_weights(tmp_path, "llama", torch.bfloat16)
    device, one_by_one = operators(eager), operators(eager)
    one_by_one.graphs.refuse("by a test")
    made = []
    for computes in (device, one_by_one):
        model = SteppedModel(computes, weights, (400, 60))
        logits = decode(computes, model, (1, 1, 1, 1))
        model.step((0, 24, 300), wanted="none")
        logits += [done(computes, model.step((1, 20 + at, 1))) for at in range(4)]
        made.append(torch.cat(logits))
    assert torch.equal(*made)


def test_any_call_may_fail_and_the_next_step_is_right(tmp_path, eager):
    weights = row_weights(tmp_path, "llama", torch.bfloat16)
    expected_of = operators(eager)
    reference = SteppedModel(expected_of, weights, LONG)
    reference.step((0, 0, 20), wanted="none")
    expected = done(expected_of, reference.step((0, 20, 1)))
    failures = 0
    for call in range(1, 40):
        device = operators(eager)
        model = SteppedModel(device, weights, LONG)
        model.step((0, 0, 20), wanted="none")
        model.step((0, 20, 1))
        eager.fail_call(call)
        try:
            model.step((0, 20, 1))
            done(device, model.step((0, 20, 1)))
        except DeviceError:
            failures += 1
        if not eager.has_failed():
            break
        eager.fail_call(0)
        assert torch.equal(done(device, model.step((0, 20, 1))), expected)
    eager.fail_call(0)
    assert failures >= 4 and call > 8


# Products by torch


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_tiles_of_rows_of_any_length_begin_alike(dtype):
    rows = products.Products.tile_rows(None, dtype)
    assert rows * dtype.itemsize % products.TILE_ALIGNMENT == 0
    assert rows * torch.float32.itemsize % products.TILE_ALIGNMENT == 0


def test_this_torch_has_products_of_halves_in_float32():
    schema = torch.ops.aten.mm.dtype_out._schema
    assert [argument.name for argument in schema.arguments] == ["self", "mat2", "out_dtype", "out"]
    products.check_products()


def test_a_torch_that_has_none_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(products.torch.ops, "aten", type("Old", (), {"mm": object()}))
    with pytest.raises(DeviceError, match="mm takes out_dtype"):
        products.check_products()

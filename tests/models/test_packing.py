"""Where tensors lie in the packed model, and what a reader is told to bring them there."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aegaeon.device.packed import pack, unpack
from aegaeon.errors import CheckpointError
from aegaeon.models.checkpoint import plan_load
from aegaeon.models.layers import Decoder
from aegaeon.models.packing import PackPlan, plan_pack
from aegaeon.models.references import resolve
from aegaeon.models.safetensors import version_of
from aegaeon.models.weights import read_weights
from aegaeon.types import Quantize
from tests.support.checkpoints import make_checkpoint
from tests.support.coming import Coming
from tests.support.dense_device import DenseDevice, dense_batch


def plan_of(directory: Path) -> PackPlan:
    return plan_pack(plan_load(directory))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    overrides = {"vocab_size": 390, "tie_word_embeddings": False, "attention_bias": True}
    return make_checkpoint(tmp_path / "m", "qwen3", dtype=torch.bfloat16, shards=2, **overrides)


@pytest.mark.parametrize("tied", [False, True])
def test_places_are_aligned_and_in_the_order_of_stages(tied: bool, tmp_path: Path) -> None:
    plan = plan_of(make_checkpoint(tmp_path, "qwen3", vocab_size=390, tie_word_embeddings=tied))
    end, stage = 0, 0
    for tensor in plan.tensors.values():
        assert tensor.offset % 64 == 0 and 0 <= tensor.offset - end < 64
        assert tensor.stage in {stage, stage + 1}
        if tensor.stage > stage:
            assert plan.stage_ends[stage] == tensor.offset
        end, stage = tensor.offset + tensor.data_bytes, tensor.stage
    assert plan.stages == stage + 1
    assert 0 <= plan.total_bytes - end < 64


def test_stages_come_in_the_order_of_need(model: Path) -> None:
    stages = {name: tensor.stage for name, tensor in plan_of(model).tensors.items()}
    assert stages["model.layers.0.self_attn.q_proj.weight"] == 0
    assert stages["model.layers.1.input_layernorm.weight"] == 1
    assert stages["model.norm.weight"] == stages["lm_head.weight"] == 2
    assert stages["model.embed_tokens.weight"] == 3 == plan_of(model).stages - 1


def test_an_embedding_that_is_the_head_comes_with_the_final_norm(tmp_path: Path) -> None:
    plan = plan_of(make_checkpoint(tmp_path, "qwen3", tie_word_embeddings=True))
    stages = {name: tensor.stage for name, tensor in plan.tensors.items()}
    assert stages["model.layers.1.input_layernorm.weight"] == 1
    assert stages["model.norm.weight"] == stages["model.embed_tokens.weight"] == 2
    assert plan.stages == 3


def test_jobs_describe_matrices_as_tiles_and_vectors_as_float32(model: Path) -> None:
    plan = plan_of(model)
    jobs = dict(zip(plan.tensors, plan.jobs(), strict=True))
    table, norm = plan.tensors["model.embed_tokens.weight"], plan.tensors["model.norm.weight"]
    source = table.source
    file = (source.path, *version_of(source.path))
    expected = (file, source.offset, 390 * 64 * 2, 390, 64 * 2, 4, 1, table.offset, 3, 0)
    assert jobs[table.name] == expected
    assert table.data_bytes == 416 * 64 * 2
    source = norm.source
    file = (source.path, *version_of(source.path))
    assert jobs[norm.name] == (file, source.offset, 128, 1, 128, 2, 0, norm.offset, 2, 1)
    assert (norm.dtype, norm.data_bytes) == ("F32", 4 * 64)


def test_a_spec_costs_the_packed_bytes(model: Path) -> None:
    assert resolve(str(model), "/nowhere").weight_bytes == plan_of(model).total_bytes


def test_a_digest_names_the_files_as_they_were_planned(model: Path) -> None:
    plan = plan_of(model)
    digest = plan.digest()
    assert len(digest) == 32 and plan_of(model).digest() == digest
    assert plan.is_current()
    shard = model / "model-00001-of-00002.safetensors"
    os.utime(shard, ns=(1, 1))
    touched = plan_of(model)
    assert touched.digest() != digest == plan.digest()
    assert touched.is_current() and not plan.is_current()
    (model / "copy").write_bytes(shard.read_bytes())
    os.utime(model / "copy", ns=(1, 1))
    (model / "copy").replace(shard)
    assert plan_of(model).digest() not in {digest, touched.digest()}
    assert not touched.is_current()
    shard.unlink()
    with pytest.raises(CheckpointError, match="download or import"):
        plan.is_current()


def test_int8_is_another_content_of_half_the_bytes_and_a_little(model: Path) -> None:
    plan, int8 = plan_of(model), plan_pack(plan_load(model), "int8")
    assert int8.digest() != plan.digest()
    assert int8.stages == plan.stages
    table, norm = int8.tensors["model.embed_tokens.weight"], int8.tensors["model.norm.weight"]
    # 13 tiles of one group: 32 lines of two inputs, and one of scales.
    assert (table.dtype, table.data_bytes) == ("I8", 13 * 33 * 64)
    assert norm.dtype == "F32"
    jobs = dict(zip(int8.tensors, int8.jobs(), strict=True))
    assert jobs[table.name][5:7] == (2, 2) and jobs[table.name][9] == 1
    assert jobs[norm.name][6] == 0
    assert resolve(str(model), "/nowhere", quantize="int8").weight_bytes == int8.total_bytes


def test_weights_that_int8_cannot_hold_are_told_of(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "llama")
    file = directory / "model.safetensors"
    stored = load_file(file)
    stored["model.norm.weight"][3] = torch.inf  # stays float32
    save_file(stored, file)
    read_weights(plan_pack(plan_load(directory), "int8"))
    stored["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(stored, file)
    read_weights(plan_pack(plan_load(directory)))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*--quantize none"):
        read_weights(plan_pack(plan_load(directory), "int8"))


def test_two_models_have_two_digests(tmp_path: Path) -> None:
    first, second = (plan_of(make_checkpoint(tmp_path / name, "llama")) for name in "ab")
    assert first.digest() != second.digest()


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_read_is_what_the_files_hold(
    dtype: torch.dtype, quantize: Quantize, tmp_path: Path
) -> None:
    directory = make_checkpoint(tmp_path, "qwen2", dtype=dtype, intermediate_size=75)
    weights = read_weights(plan_pack(plan_load(directory), quantize))
    for name, stored in load_file(directory / "model.safetensors").items():
        if stored.dim() == 2:
            wanted = stored if quantize == "none" else unpack(pack(stored, torch.int8))
            assert torch.equal(unpack(weights.matrix(name)), wanted), name
        else:
            assert weights.vector(name).dtype == torch.float32
            assert torch.equal(weights.vector(name), stored.float()), name


def test_matrices_may_lie_row_by_row(model: Path) -> None:
    plan = plan_pack(plan_load(model), layout="rows")
    assert plan.digest() != plan_of(model).digest()
    weights = read_weights(plan)
    for name, tensor in plan.tensors.items():
        stored = load_file(tensor.source.path)[name]
        bytes_there = weights.memory[tensor.offset : tensor.offset + tensor.data_bytes]
        found = bytes_there.view(torch.float32 if stored.dim() == 1 else stored.dtype)
        assert torch.equal(found.view(stored.shape), stored.to(found.dtype)), name


def test_tensors_of_several_types_in_one_model(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "llama")
    file = directory / "model.safetensors"
    stored = load_file(file)
    name = "model.layers.0.self_attn.k_proj.weight"
    stored[name] = stored[name].to(torch.float16)
    save_file(stored, file)
    plan = plan_of(directory)
    assert plan.tensors[name].dtype == "F16"
    assert torch.equal(unpack(read_weights(plan).matrix(name)), stored[name])


def test_a_decoder_awaits_each_stage_before_it_computes_with_it(model: Path) -> None:
    """Stages come in only when they are awaited, into memory that is NaN before."""
    coming = Coming(plan_of(model))
    config = coming.plan.load_plan.config
    expected = Decoder(config, DenseDevice(), coming.whole).forward(dense_batch([5, 6, 7]))
    decoder = Decoder(config, DenseDevice(), coming.weights)
    assert not coming.awaited
    assert torch.equal(decoder.forward(dense_batch([5, 6, 7])), expected)
    assert coming.awaited == [0, 1, 2]
    # The embedding is waited for once it has come, which costs nothing.
    coming.await_stage(3)
    decoder.forward(dense_batch([8], start=3))
    assert coming.awaited == [0, 1, 2, 3, 3, 0, 1, 2]

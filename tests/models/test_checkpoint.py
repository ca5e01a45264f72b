"""Damaged, missing and mismatching weight files: one line that says what and what to do."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from aegaeon.errors import AegaeonError, CheckpointError, UnsupportedModel
from aegaeon.models.checkpoint import plan_load
from aegaeon.models.packing import plan_pack
from aegaeon.models.registry import load_model
from aegaeon.models.safetensors import parse_header, read_header
from tests.support.checkpoints import make_checkpoint
from tests.support.dense_device import DenseDevice

NORM = "model.norm.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "llama")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "sharded", "llama", shards=2)


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


def assert_refused(directory: Path, *facts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        plan_load(directory)
    message = str(caught.value)
    assert all(fact in message for fact in facts), message
    assert "\n" not in message and ";" in message


def test_the_plan_counts_parameters_and_bytes(tmp_path: Path) -> None:
    plan = plan_load(make_checkpoint(tmp_path, "qwen3", dtype=torch.bfloat16))
    stored = load_file(tmp_path / "model.safetensors")
    assert plan.parameters == sum(tensor.numel() for tensor in stored.values())
    assert plan.file_bytes == 2 * plan.parameters


def test_loading_tells_its_progress_and_its_weight(model: Path) -> None:
    steps: list[tuple[int, int]] = []
    decoder = load_model(model, DenseDevice(), lambda done, total: steps.append((done, total)))
    plan = plan_load(model)
    assert decoder.weight_bytes == plan_pack(plan).total_bytes
    assert steps == sorted(steps)
    assert steps[-1] == (plan.file_bytes, plan.file_bytes)


def test_a_missing_tensor_is_named(model: Path) -> None:
    change_weights(model, lambda weights: weights.pop(NORM))
    assert_refused(model, NORM, "lacks")


def test_a_shape_against_the_configuration_is_named_with_both_shapes(model: Path) -> None:
    change_weights(model, lambda weights: weights.update({NORM: torch.ones(63)}))
    assert_refused(model, NORM, "[63]", "[64]")


def test_an_unloadable_type_is_unsupported(model: Path) -> None:
    ones = torch.ones(64, dtype=torch.int8)
    change_weights(model, lambda weights: weights.update({NORM: ones}))
    with pytest.raises(UnsupportedModel, match="I8"):
        plan_load(model)


def test_tensors_that_the_model_does_not_use_are_ignored(model: Path) -> None:
    unused = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change_weights(model, lambda weights: weights.update(unused))
    plan_load(model)


@pytest.mark.parametrize("kept", [0, 4, 8, 9, 200, -1, -5000])
def test_a_truncated_file_is_damaged(model: Path, kept: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert_refused(model, "model.safetensors is damaged")


def test_bytes_behind_the_data_are_damage(model: Path) -> None:
    with (model / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert_refused(model, "too long")


def test_a_file_cut_after_planning_is_an_error_and_no_crash(model: Path) -> None:
    def cut(done: int, total: int) -> None:
        (model / "model.safetensors").write_bytes(b"")

    with pytest.raises(CheckpointError, match="cut off"):
        load_model(model, DenseDevice(), cut)


def test_no_weights_at_all(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert_refused(model, "has no model.safetensors")


def test_pickled_weights_are_never_read(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert_refused(model, "pickled", "safetensors")


def test_a_gguf_leads_to_the_import(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model.gguf")
    assert_refused(model, "aegaeon models import")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert_refused(sharded, "model-00002-of-00002.safetensors is missing")


def test_a_shard_without_its_promised_tensor(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00002.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(sharded, "lm_head.weight", "promises")


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "x\0.safetensors",
        "..",
        "",
        "w.bin",
    ],
)
def test_an_index_cannot_lead_out_of_its_directory(sharded: Path, file: str) -> None:
    outside = sharded.parent / "outside.safetensors"
    outside.write_bytes((sharded / "model-00001-of-00002.safetensors").read_bytes())
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"][NORM] = file
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(sharded, "not a safetensors file beside it")


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b'{"weight_map": {"a": 1}}', b"\xff\xfe", b"["]
)
def test_a_damaged_index_is_one_error(sharded: Path, text: bytes) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(text)
    assert_refused(sharded, "index")


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": None},
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        },
    ],
)
def test_headers_that_lie_are_refused(header: dict) -> None:
    with pytest.raises(CheckpointError):
        parse_header(json.dumps(header).encode(), 8, Path("file"))


def test_a_header_length_beyond_the_file_reads_nothing(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(struct.pack("<Q", 1 << 63) + b"{}")
    with pytest.raises(CheckpointError, match="cut off"):
        read_header(tmp_path / "f")


HEADER = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "one": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "two": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
).encode()


@given(data=st.data())
def test_any_damage_to_a_header_is_a_checkpoint_error_or_harmless(data: st.DataObject) -> None:
    header = bytearray(HEADER)
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(header) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert"])):
            case "set":
                header[at] = data.draw(st.integers(0, 255))
            case "cut":
                del header[at : at + data.draw(st.integers(1, 9))]
                header = header or bytearray(b"{")
            case "insert":
                header[at:at] = data.draw(st.binary(max_size=9))
    try:
        tensors = parse_header(bytes(header), 32, Path("file"))
    except AegaeonError as error:
        assert isinstance(error, CheckpointError)
        assert "\n" not in str(error)
    else:
        assert sum(tensor.data_bytes for tensor in tensors.values()) == 32


@pytest.mark.parametrize(
    "header",
    [
        b'{"__metadata__":' + b'{"a":' * 200_000,
        b'{"__metadata__":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"a":{"dtype":"F32","shape":[' + b"[" * 200_000,
        b'{"a":{"dtype":"F32","x":' + b"[" * 200_000 + b"]" * 200_000 + b"}}",
    ],
)
def test_a_header_that_nests_without_end_is_an_error(header: bytes) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        parse_header(header, 0, Path("x"))


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:
        opened.write((8 << 30).to_bytes(8, "little"))
        opened.truncate(9 << 30)  # sparse
    with pytest.raises(CheckpointError, match=f"claims {8 << 30} bytes"):
        read_header(file)


def test_tensors_without_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aegaeon.models.safetensors.MAX_TENSORS", 3)
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    names = ",".join(f'"{name}":{entry}' for name in "abcd")
    with pytest.raises(CheckpointError, match="names 4 tensors"):
        parse_header(f"{{{names}}}".encode(), 0, Path("x"))

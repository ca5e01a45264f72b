"""GGUF import: against transformers' own reading of the file, and on damaged files."""

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from aegaeon.errors import AegaeonError, CheckpointError, ConfigError, UnsupportedModel
from aegaeon.models.config import RopeConfig, read_config
from aegaeon.models.gguf import gguf_name, import_gguf
from aegaeon.models.registry import load_model
from aegaeon.models.rope import inverse_frequencies
from tests.support.checkpoints import make_config, random_weights
from tests.support.dense_device import DenseDevice, dense_batch
from tests.support.smollm2 import smollm2_directory

TEXTS = [
    "Hello, world!",
    "  two spaces,\ttab\n\n\nand   trailing   ",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. ẞ ŉ",
    "日本語のテキスト、한국어 텍스트, русский текст, العربية",
    "🙂👩‍👩‍👧‍👦 emoji and e\u0301 combining, \u00a0nbsp \u200b zwsp",
    "1234567890 3.14159 2026-11-23 0xFF",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}  # it's I'LL we've\r\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><think>",
    "",
]
SMALL_VOCAB = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_gguf(path: Path, family: str = "llama", pre: str = "qwen2", **changes: Any) -> dict:
    """Write a small random GGUF as llama.cpp would; returns its weights in Hugging Face's names."""
    metadata = changes.pop("metadata", {})
    extra = changes.pop("tensors", {})
    tokens = [*SMALL_VOCAB, *sorted(ByteLevel.alphabet()), "th", "the"]
    config = make_config(family, vocab_size=len(tokens), **changes)
    weights = random_weights(config, 5, torch.float32)
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SMALL_VOCAB) + [1] * (len(tokens) - len(SMALL_VOCAB)))
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(2)
    for key, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        (writer.add_bool if isinstance(value, bool) else add)(key, value)
    for name, tensor in weights.items():
        values = tensor.numpy()
        if family == "llama" and (".q_proj." in name or ".k_proj." in name):
            values = permute(values, config["head_dim"])
        writer.add_tensor(gguf_name(name), values)
    for name, values in extra.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def permute(values: np.ndarray, head_dim: int) -> np.ndarray:
    """llama.cpp's order of query and key rows: the halves of a head interleaved."""
    heads = values.shape[0] // head_dim
    split = values.reshape(heads, 2, head_dim // 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
    ],
)
def test_import_keeps_every_weight(family: str, changes: dict, tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "model.gguf", family, **changes)
    progress: list[tuple[int, int]] = []
    out = import_gguf(
        tmp_path / "model.gguf", tmp_path / "out", "f32", lambda *step: progress.append(step)
    )
    stored = load_file(out / "model.safetensors")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weights[name]) for name in weights)
    assert progress[-1][0] == progress[-1][1] == sum(w.nbytes for w in weights.values())
    config = read_config(out)
    assert (config.rms_norm_eps, config.rope.theta) == (1e-6, 10000.0)
    load_model(out, DenseDevice()).forward(dense_batch([1, 7, 200]))


def test_import_is_refused_over_an_existing_directory(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        import_gguf(tmp_path / "model.gguf", tmp_path / "out")


def test_an_interrupted_import_leaves_nothing(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_gguf(tmp_path / "model.gguf", tmp_path / "models" / "out", on_progress=interrupt)
    assert list((tmp_path / "models").iterdir()) == []


def test_an_import_sweeps_what_killed_ones_left_and_spares_live_ones(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    with subprocess.Popen(["true"]) as ended:
        ended.wait(30)
    dead = tmp_path / f".out.import-{ended.pid}"
    kept = [tmp_path / f".out.import-{os.getppid()}", tmp_path / ".other.import-1"]
    kept.append(tmp_path / ".out.import-mine")
    for left in (dead, *kept):
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"half")
    import_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert not dead.exists()
    assert all(left.exists() for left in kept)


def test_a_file_cut_anywhere_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", num_hidden_layers=1)
    whole = (tmp_path / "model.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 7, 12, 23, 24, *range(30, len(whole), len(whole) // 60)]:
        cut.write_bytes(whole[:length])
        with pytest.raises(AegaeonError):
            import_gguf(cut, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_an_endless_list_is_an_error_at_once(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    data = bytearray((tmp_path / "model.gguf").read_bytes())
    at = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    assert struct.unpack_from("<Q", data, at) == (len(SMALL_VOCAB) + 258,)
    struct.pack_into("<Q", data, at, 1 << 24)
    (tmp_path / "endless.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match="more than it holds"):
        import_gguf(tmp_path / "endless.gguf", tmp_path / "out")


def test_lists_nested_without_end_are_an_error(tmp_path: Path) -> None:
    key = struct.pack("<Q", 4) + b"deep"
    nested = struct.pack("<IQ", 9, 1) * 3000  # a list of one list of one list ...
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    (tmp_path / "deep.gguf").write_bytes(header + key + struct.pack("<I", 9) + nested)
    with pytest.raises(CheckpointError):
        import_gguf(tmp_path / "deep.gguf", tmp_path / "out")


def test_weights_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    broken = np.full((64,), np.nan, np.float32)
    write_gguf(tmp_path / "model.gguf")
    data = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "nan.gguf").write_bytes(data[: -broken.nbytes] + broken.tobytes())
    with pytest.raises(CheckpointError, match="no numbers"):
        import_gguf(tmp_path / "nan.gguf", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"GGU", b"not a gguf file", b"PK\x03\x04" * 10])
def test_other_files_are_no_gguf(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        import_gguf(tmp_path / "file.gguf", tmp_path / "out")


def test_an_unknown_tensor_type_is_unsupported(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    data = bytearray((tmp_path / "model.gguf").read_bytes())
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    assert struct.unpack_from("<I", data, at) == (0,)  # F32
    struct.pack_into("<I", data, at, 9999)
    (tmp_path / "odd.gguf").write_bytes(data)
    with pytest.raises(UnsupportedModel):
        import_gguf(tmp_path / "odd.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"pre": "deepseek-llm"}, "pre-tokenizer 'deepseek-llm'"),
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "longrope"),
        ({"tensors": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}}, "attn_sinks"),
        ({"tensors": {"rope_freqs.weight": np.full(8, 3, np.float32)}}, "llama3 scaling"),
    ],
)
def test_what_is_not_built_is_refused(changes: dict, fact: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", **changes)
    with pytest.raises(UnsupportedModel, match=fact):
        import_gguf(tmp_path / "model.gguf", tmp_path / "out")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    data = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "odd.gguf").write_bytes(data.replace(b"llama", b"mamba"))
    with pytest.raises(UnsupportedModel, match="'mamba'"):
        import_gguf(tmp_path / "odd.gguf", tmp_path / "out")


def test_without_the_gguf_package_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'aegaeon\[gguf\]'"):
        import_gguf(tmp_path / "model.gguf", tmp_path / "out")


def test_linear_and_yarn_scaling_are_carried_over(tmp_path: Path) -> None:
    scaling = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "yarn.gguf", metadata=scaling)
    yarn = read_config(import_gguf(tmp_path / "yarn.gguf", tmp_path / "yarn")).rope
    assert (yarn.kind, yarn.factor, yarn.original_context_tokens) == ("yarn", 4.0, 512.0)
    scaling["llama.rope.scaling.type"] = "linear"
    write_gguf(tmp_path / "linear.gguf", metadata=scaling)
    linear = read_config(import_gguf(tmp_path / "linear.gguf", tmp_path / "linear")).rope
    assert (linear.kind, linear.factor) == ("linear", 4.0)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised_by_its_table(factor: float, tmp_path: Path) -> None:
    config = make_config("llama", head_dim=64, rope_theta=500000.0)
    plain = RopeConfig(theta=500000.0)
    scaled = RopeConfig(
        kind="llama3", theta=500000.0, factor=factor, original_context_tokens=8192.0
    )
    table = inverse_frequencies(plain, 64) / inverse_frequencies(scaled, 64)
    write_gguf(
        tmp_path / "model.gguf",
        head_dim=config["head_dim"],
        rope_theta=config["rope_theta"],
        tensors={"rope_freqs.weight": table.numpy()},
    )
    assert read_config(import_gguf(tmp_path / "model.gguf", tmp_path / "out")).rope == scaled


def test_a_bos_token_is_put_first_where_the_file_asks_for_it(tmp_path: Path) -> None:
    asks = {"tokenizer.ggml.add_bos_token": True}
    path = tmp_path / "model.gguf"
    write_gguf(path, pre="llama-bpe", metadata=asks)
    with_bos = path.read_bytes().replace(
        b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.bos_token_id"
    )
    path.write_bytes(with_bos)
    out = import_gguf(path, tmp_path / "out")
    ids = Tokenizer.from_file(str(out / "tokenizer.json")).encode("the").ids
    assert ids == [2, len(SMALL_VOCAB) + 256 + 1]


def smollm2_gguf() -> Path:
    """The GGUF of the demo weights, or skip: `make weights` fetches it."""
    path = Path(__file__).parents[2] / "models" / ".downloads" / "smollm2.gguf"
    if not path.is_file():
        pytest.skip("needs the demo weights; run `make weights` once")
    return path


def test_smollm2_has_the_tokens_of_transformers() -> None:
    source = smollm2_gguf()
    theirs = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    ours = Tokenizer.from_file(str(smollm2_directory() / "tokenizer.json"))
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_an_import_has_the_weights_that_transformers_reads(family: str, tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    write_gguf(source, family)
    directory = import_gguf(source, tmp_path / "out", "f32")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    theirs = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=skeleton)
    stored = load_file(directory / "model.safetensors")
    assert stored.keys() == theirs["tensors"].keys() - {"lm_head.weight"}
    for name, tensor in stored.items():
        assert torch.equal(tensor, theirs["tensors"][name]), name
    ours, read = read_config(directory), theirs["config"]
    assert (ours.layers, ours.kv_heads) == (read["num_hidden_layers"], read["num_key_value_heads"])


def test_a_header_of_more_values_than_a_model_has_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aegaeon.models.gguf.MAX_HEADER_READS", 10_000)
    count = 50_000
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    file = tmp_path / "x.gguf"
    file.write_bytes(head + struct.pack("<IIQ", 9, 0, count) + bytes(count))
    with pytest.raises(CheckpointError, match="more values than any model"):
        import_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""Small random checkpoints in the Hugging Face layout, made on the spot, tokenizer and all."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, IM_START, IM_END = range(3)
VOCAB_TOKENS = 384

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CORPUS = (
    "The quick brown fox jumps over the lazy dog. 0123456789\n",
    "A device passes from model to model between tokens.\n",
    "def main():\n    return {'answer': 42}\n",
    "user assistant system tool\n",
    "She sells sea shells by the sea shore; where it stood before, nothing stands now.\n",
)


def make_checkpoint(
    directory: str | Path,
    family: str = "llama",
    *,
    seed: int = 0,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint of `family` (llama, qwen2, qwen3) and return its directory.

    `overrides` go into config.json; one of value None takes the key away. Ids 0 to 2 are
    <|endoftext|>, <|im_start|> and <|im_end|>. Same arguments, same bytes.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = make_config(family, **overrides)
    _write_json(directory / "config.json", config)
    write_weights(directory, random_weights(config, seed, dtype), shards)
    write_tokenizer(directory, config)
    return directory


def make_config(family: str, **overrides: Any) -> dict[str, Any]:
    """Return a small config.json of `family`, changed by `overrides`."""
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": VOCAB_TOKENS,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": IM_START,
        "eos_token_id": IM_END,
        "pad_token_id": END_OF_TEXT,
    }
    config.update(overrides)
    return {key: value for key, value in config.items() if value is not None}


def random_weights(config: dict[str, Any], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw every tensor of `config`, of a size that keeps logits far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(config):
        scale = 0.3 if len(shape) == 1 else 1.5 / math.sqrt(shape[-1])
        values = torch.randn(shape, generator=generator) * scale
        if name.endswith("norm.weight"):
            values += 1.0
        weights[name] = values.to(dtype)
    return weights


def tensor_shapes(config: dict[str, Any]) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor that a checkpoint of `config` holds."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in _layer_shapes(config):
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings", False):
        yield "lm_head.weight", (vocab, hidden)


def _layer_shapes(config: dict[str, Any]) -> Iterable[tuple[str, tuple[int, ...]]]:
    family = config["model_type"]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    q_rows, kv_rows = heads * head_dim, config.get("num_key_value_heads", heads) * head_dim
    attention_bias = config.get("attention_bias", False)
    yield "input_layernorm.weight", (hidden,)
    for name, rows, columns in (
        ("q_proj", q_rows, hidden),
        ("k_proj", kv_rows, hidden),
        ("v_proj", kv_rows, hidden),
        ("o_proj", hidden, q_rows),
    ):
        yield f"self_attn.{name}.weight", (rows, columns)
        if attention_bias or (family == "qwen2" and name != "o_proj"):
            yield f"self_attn.{name}.bias", (rows,)
    if family == "qwen3":
        yield "self_attn.q_norm.weight", (head_dim,)
        yield "self_attn.k_norm.weight", (head_dim,)
    yield "post_attention_layernorm.weight", (hidden,)
    for name, rows, columns in (
        ("gate_proj", inner, hidden),
        ("up_proj", inner, hidden),
        ("down_proj", hidden, inner),
    ):
        yield f"mlp.{name}.weight", (rows, columns)
        if config.get("mlp_bias", False):
            yield f"mlp.{name}.bias", (rows,)


def write_weights(directory: Path, weights: dict[str, Tensor], shards: int = 1) -> None:
    """Write one model.safetensors, or `shards` files and their index."""
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(weights)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def write_tokenizer(directory: Path, config: dict[str, Any]) -> None:
    """Train a byte-level BPE on a few lines and write tokenizer, template, generation config."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(directory / "tokenizer_config.json", tokenizer_config)
    generation = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(directory / "generation_config.json", generation)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

"""GGUF metadata -> config.json and generation_config.json."""

from collections.abc import Set
from typing import Any

import numpy as np
import torch

from aegaeon.errors import CheckpointError, UnsupportedModel
from aegaeon.models.config import RopeConfig
from aegaeon.models.rope import inverse_frequencies

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Llama 3.1 to 3.3 stretch by 8, 3.2 by 32; the rest of their scaling is the same in all.
LLAMA3_FACTORS = (8.0, 16.0, 32.0)
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class GgufMetadata:
    """Metadata values by key, with the checks that reading a stranger's file needs."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.source = source
        self._values = values
        self.architecture = self.text("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise UnsupportedModel(
                f"{source}: architecture {self.architecture!r} is not supported; "
                f"supported are {', '.join(ARCHITECTURES)}"
            )

    def get(self, key: str) -> Any:
        """Return the value or None."""
        return self._values.get(key)

    def text(self, key: str) -> str:
        """Return the text at `key`. Raises CheckpointError."""
        value = self._values.get(key)
        if not isinstance(value, str):
            raise self._wrong(key, "text", value)
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """Return the whole number at `key` of the architecture. Raises CheckpointError."""
        value = self._values.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(f"{self.architecture}.{key}", "one whole number", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return the number at `key` of the architecture, float32 as its shortest decimal."""
        value = self._values.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self._wrong(f"{self.architecture}.{key}", "a number", value)
        return float(str(np.float32(value)))

    def texts(self, key: str) -> list[str]:
        """Return the list of texts at `key`. Raises CheckpointError."""
        value = self._values.get(key)
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise self._wrong(key, "a list of texts", value)
        return value

    def integers(self, key: str) -> list[int]:
        """Return the list of whole numbers at `key`. Raises CheckpointError."""
        value = self._values.get(key)
        if not isinstance(value, list) or not all(isinstance(part, int) for part in value):
            raise self._wrong(key, "a list of whole numbers", value)
        return value

    def token_id(self, name: str) -> int | None:
        """Return tokenizer.ggml.NAME_token_id, None if there is none or it is no token."""
        value = self._values.get(f"tokenizer.ggml.{name}_token_id")
        tokens = self._values.get("tokenizer.ggml.tokens") or ()
        return value if isinstance(value, int) and 0 <= value < len(tokens) else None

    def _wrong(self, key: str, wanted: str, value: object) -> CheckpointError:
        found = "nothing" if value is None else type(value).__name__
        return CheckpointError(
            f"{self.source}: {key} must be {wanted}, found {found}; download the file again"
        )


def config_json(
    metadata: GgufMetadata,
    tensor_names: Set[str],
    vocab_tokens: int,
    rope_factors: list[float] | None,
) -> dict[str, Any]:
    """Return config.json of the file. `rope_factors` is what rope_freqs.weight divides by.

    Raises CheckpointError, UnsupportedModel (experts, scalings that are not built).
    """
    hidden, heads, head_dim = _attention_shape(metadata)
    has_output_bias = "blk.0.attn_output.bias" in tensor_names
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[metadata.architecture]],
        "model_type": metadata.architecture,
        "vocab_size": vocab_tokens,
        "hidden_size": hidden,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.integer("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.number("rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "bos_token_id": metadata.token_id("bos"),
        "eos_token_id": metadata.token_id("eos"),
        "pad_token_id": metadata.token_id("padding"),
    }
    if metadata.architecture == "qwen2":
        config["use_sliding_window"] = False
    else:
        config["attention_bias"] = has_output_bias or "blk.0.attn_q.bias" in tensor_names
    if metadata.architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_down.bias" in tensor_names
    scaling = _rope_scaling(metadata, rope_factors, config["rope_theta"], head_dim)
    return config if scaling is None else config | {"rope_scaling": scaling}


def _attention_shape(metadata: GgufMetadata) -> tuple[int, int, int]:
    """Return (hidden size, heads, head_dim). Raises CheckpointError, UnsupportedModel."""
    if metadata.integer("expert_count", 0):
        raise UnsupportedModel(
            f"{metadata.source}: mixtures of experts are not built; take a dense model"
        )
    hidden, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    if heads < 1:
        raise CheckpointError(f"{metadata.source}: no attention heads; download the file again")
    head_dim = metadata.integer("attention.key_length", hidden // heads)
    if metadata.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel(f"{metadata.source}: values and keys of unequal size are not built")
    if metadata.integer("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModel(f"{metadata.source}: rotating part of a head is not built")
    return hidden, heads, head_dim


def generation_json(metadata: GgufMetadata) -> dict[str, Any]:
    """Return generation_config.json: the ids that begin, end and pad."""
    ends = [metadata.token_id("eos"), metadata.token_id("eot")]
    tokens = metadata.texts("tokenizer.ggml.tokens")
    # Qwen's own configuration ends at both; GGUF has room for one.
    if metadata.architecture.startswith("qwen") and "<|endoftext|>" in tokens:
        ends.append(tokens.index("<|endoftext|>"))
    return {
        "bos_token_id": metadata.token_id("bos"),
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)),
        "pad_token_id": metadata.token_id("padding"),
    }


def _rope_scaling(
    metadata: GgufMetadata, factors: list[float] | None, theta: float, head_dim: int
) -> dict[str, Any] | None:
    kind = metadata.get(f"{metadata.architecture}.rope.scaling.type") or "none"
    if factors is not None:
        if kind != "none":
            raise UnsupportedModel(f"{metadata.source}: RoPE is scaled twice; take the safetensors")
        return _llama3_scaling(metadata.source, factors, theta, head_dim)
    match kind:
        case "none":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": metadata.number("rope.scaling.factor")}
        case "yarn":
            return _yarn_scaling(metadata)
    raise UnsupportedModel(f"{metadata.source}: rope scaling {kind!r} is not built")


def _yarn_scaling(metadata: GgufMetadata) -> dict[str, Any]:
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"):
        if metadata.get(f"{metadata.architecture}.rope.scaling.{key}") is not None:
            raise UnsupportedModel(
                f"{metadata.source}: rope.scaling.{key} is not built; take the safetensors"
            )
    return {
        "rope_type": "yarn",
        "factor": metadata.number("rope.scaling.factor"),
        "original_max_position_embeddings": metadata.integer(
            "rope.scaling.original_context_length", metadata.integer("context_length")
        ),
        "beta_fast": metadata.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": metadata.number("rope.scaling.yarn_beta_slow", 1.0),
    }


def _llama3_scaling(
    source: str, factors: list[float], theta: float, head_dim: int
) -> dict[str, Any]:
    """Find the llama3 scaling whose table `factors` is: GGUF keeps the table, not its makings."""
    found = torch.tensor(factors)
    plain = inverse_frequencies(RopeConfig(theta=theta), head_dim)
    for factor in LLAMA3_FACTORS:
        rope = RopeConfig(kind="llama3", theta=theta, factor=factor, original_context_tokens=8192.0)
        expected = plain / inverse_frequencies(rope, head_dim)
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3):
            return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}
    raise UnsupportedModel(
        f"{source}: rope_freqs.weight is no known llama3 scaling; take the model's safetensors"
    )

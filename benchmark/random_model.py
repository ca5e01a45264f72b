"""Random checkpoints of any size, written as fast as the disk takes them; their text is nothing."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from aegaeon.models.checkpoint import tensor_shapes
from aegaeon.models.config import read_config

# 1.2 GB in bfloat16.
QWEN3_06B: dict[str, int] = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
# 4 MB.
SMALL: dict[str, int] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
# Little to compute, and 256 KiB of keys and values for each token.
WIDE_KV: dict[str, int] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
}

Header = dict[str, dict[str, object]]


def write_model(directory: Path, sizes: dict[str, int], seed: int = 0) -> Path:
    """Write a Qwen3 of `sizes` in bfloat16 and return its file, which is on the disk by then."""
    directory.mkdir(parents=True, exist_ok=True)
    config = sizes | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # Served models must have one; token ids need none.
    (directory / "tokenizer.json").write_text("{}", encoding="utf-8")
    header, shapes = _header(directory)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = directory / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in _values(shapes, np.random.default_rng(seed)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return path


def _header(directory: Path) -> tuple[Header, list[tuple[int, ...]]]:
    header: Header = {}
    shapes, offset = [], 0
    for name, shape in tensor_shapes(read_config(directory)):
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        shapes.append(shape)
        offset = end
    return header, shapes


def _values(shapes: list[tuple[int, ...]], rng: np.random.Generator) -> Iterator[bytes]:
    """Yield the elements of each tensor: of either sign and about 1 / sqrt(its columns)."""
    for shape in shapes:
        exponent = 127 - round(math.log2(shape[-1]) / 2)
        bits = rng.integers(0, 1 << 16, math.prod(shape), np.uint16)
        yield (bits & np.uint16(0x807F) | np.uint16(exponent << 7)).tobytes()

"""config.json of the supported families as checked fields, and what sets the families apart.

Each family's module turns an HfConfig into Features; ModelConfig is built from both in config.py.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from aegaeon.errors import UnsupportedModel

MAX_COUNT = 1 << 31
Count = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
# Far beyond any model; what counts layers elsewhere counts on it.
Layers = Annotated[int, Meta(ge=1, le=4096)]
Positive = Annotated[float, Meta(gt=0, le=1e12)]
# Of RoPE; beyond these its formulas leave what floats can hold.
Scale = Annotated[float, Meta(ge=1e-6, le=1e12)]
# Names are printed when they are refused.
Name = Annotated[str, Meta(max_length=100, pattern=r"^[ -~]*$")]


class RopeFields(msgspec.Struct, frozen=True, kw_only=True):
    """`rope_parameters` (transformers 5) or `rope_scaling` (before) of config.json."""

    rope_type: Name | None = None
    type: Name | None = None
    rope_theta: Scale | None = None
    factor: Scale | None = None
    original_max_position_embeddings: Scale | None = None
    low_freq_factor: Scale | None = None
    high_freq_factor: Scale | None = None
    attention_factor: Scale | None = None
    beta_fast: Scale | None = None
    beta_slow: Scale | None = None
    mscale: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    mscale_all_dim: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    truncate: bool | None = None
    partial_rotary_factor: float | None = None


class HfConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of config.json that change what a model computes; others are ignored."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    max_position_embeddings: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    rms_norm_eps: Positive = 1e-6
    hidden_act: Name = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: Scale | None = None
    rope_scaling: RopeFields | None = None
    rope_parameters: RopeFields | None = None
    partial_rotary_factor: float | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int | None = None
    layer_types: tuple[Name, ...] | None = None
    quantization_config: dict[str, msgspec.Raw] | None = None


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """Where the families differ: which projections have a bias, whether queries and keys are
    normed per head, and the head size where config.json names none (None: hidden / heads)."""

    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    default_head_dim: int | None = None


def refuse_sliding_window(raw: HfConfig) -> None:
    """Raise UnsupportedModel if some layer would see less than the whole context."""
    if not raw.use_sliding_window or raw.sliding_window is None:
        return
    if raw.layer_types is not None:
        is_active = "sliding_attention" in raw.layer_types
    else:
        first = 28 if raw.max_window_layers is None else raw.max_window_layers
        is_active = first < raw.num_hidden_layers
    if is_active and raw.sliding_window < raw.max_position_embeddings:
        raise UnsupportedModel(
            f"the model uses a sliding window of {raw.sliding_window} tokens, which is not built; "
            "set use_sliding_window to false in config.json if full attention is acceptable"
        )

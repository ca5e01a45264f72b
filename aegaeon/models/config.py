"""A model's config.json as one checked record, for the families this version runs. No torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from aegaeon.errors import CheckpointError, ModelNotFound, UnsupportedModel
from aegaeon.models import llama, qwen2, qwen3
from aegaeon.models.families import MAX_COUNT, Features, HfConfig, Name, RopeFields
from aegaeon.specs import ModelSpec

FAMILIES: dict[str, Callable[[HfConfig], Features]] = {
    "LlamaForCausalLM": llama.features,
    "Qwen2ForCausalLM": qwen2.features,
    "Qwen3ForCausalLM": qwen3.features,
}
ARCHITECTURE_OF_TYPE = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_KINDS = ("default", "linear", "llama3", "yarn")
# A config.json of more bytes is none.
MAX_CONFIG_BYTES = 16 << 20

RopeKind = Literal["default", "linear", "llama3", "yarn"]


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How positions become angles. Fields behind `factor` belong to llama3 and yarn."""

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_context_tokens: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a decoder computes. Sizes are in elements, `context_tokens` in tokens."""

    architecture: str
    vocab_tokens: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_tokens: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool


class _Kind(msgspec.Struct, frozen=True):
    architectures: tuple[Name, ...] | None = None
    model_type: Name | None = None


def read_config(directory: str | Path) -> ModelConfig:
    """Read and check `directory`/config.json.

    Raises ModelNotFound (no such file), CheckpointError (not what it should be) and
    UnsupportedModel (an architecture or feature this version cannot run).
    """
    path = Path(directory) / "config.json"
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ModelNotFound(
            f"cannot read {path} ({error.strerror}); name a directory in the Hugging Face layout"
        ) from None
    if len(text) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} is over {MAX_CONFIG_BYTES} bytes; restore the file")
    return parse_config(text, str(path))


def config_of(spec: ModelSpec) -> ModelConfig:
    """Return the configuration of a served model: that of its file, or, where this node has none
    yet, what the spec says of it. Raises what `read_config` raises."""
    try:
        return read_config(spec.path)
    except ModelNotFound:
        if not spec.config:
            raise
        return msgspec.json.decode(spec.config, type=ModelConfig)


def parse_config(text: bytes, source: str = "config.json") -> ModelConfig:
    """Turn the bytes of a config.json into a ModelConfig; errors as of read_config."""
    try:
        architecture = _architecture(msgspec.json.decode(text, type=_Kind), source)
        raw = msgspec.json.decode(text, type=HfConfig)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"{source} is not a usable model configuration: {error}; restore the file"
        ) from None
    _refuse_unbuilt(raw, source)
    features = FAMILIES[architecture](raw)
    heads = raw.num_attention_heads
    head_dim = raw.head_dim or features.default_head_dim or raw.hidden_size // heads
    kv_heads = raw.num_key_value_heads or heads
    if heads % kv_heads:
        raise CheckpointError(
            f"{source}: {heads} attention heads cannot share {kv_heads} KV heads evenly; "
            "restore the file"
        )
    if head_dim == 0 or head_dim % 2:
        raise UnsupportedModel(f"{source}: head_dim is {head_dim}; it must be even and positive")
    rope = _rope(raw, source)
    return ModelConfig(
        architecture=architecture,
        vocab_tokens=raw.vocab_size,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        layers=raw.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_tokens=_context_tokens(raw, rope),
        rms_norm_eps=raw.rms_norm_eps,
        rope=rope,
        tie_word_embeddings=raw.tie_word_embeddings,
        qkv_bias=features.qkv_bias,
        output_bias=features.output_bias,
        mlp_bias=features.mlp_bias,
        qk_norm=features.qk_norm,
    )


def _architecture(kind: _Kind, source: str) -> str:
    named = kind.architectures or ()
    for name in named:
        if name in FAMILIES:
            return name
    if not named and kind.model_type in ARCHITECTURE_OF_TYPE:
        return ARCHITECTURE_OF_TYPE[kind.model_type]
    found = ", ".join(named) or kind.model_type or "none named"
    raise UnsupportedModel(
        f"{source}: architecture {found} is not supported; supported are {', '.join(FAMILIES)}"
    )


def _refuse_unbuilt(raw: HfConfig, source: str) -> None:
    if raw.hidden_act != "silu":
        raise UnsupportedModel(
            f"{source}: hidden_act {raw.hidden_act!r} is not built; only 'silu' is"
        )
    if raw.quantization_config is not None:
        raise UnsupportedModel(
            f"{source}: the weights are quantised (quantization_config), which is not built; "
            "use the model's bf16, f16 or f32 checkpoint"
        )


def _rope(raw: HfConfig, source: str) -> RopeConfig:
    # transformers lets rope_scaling win over rope_parameters, and the keys inside over those beside
    fields = raw.rope_scaling or raw.rope_parameters or RopeFields()
    kind = fields.rope_type or fields.type or "default"
    if kind not in ROPE_KINDS:
        raise UnsupportedModel(
            f"{source}: rope type {kind!r} is not built; built are {', '.join(ROPE_KINDS)}"
        )
    partial = fields.partial_rotary_factor or raw.partial_rotary_factor
    if partial not in (None, 1.0):
        raise UnsupportedModel(f"{source}: partial_rotary_factor {partial} is not built; only 1 is")
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor",),
    }[kind]
    for name in needed:
        if getattr(fields, name) is None:
            raise CheckpointError(f"{source}: rope type {kind!r} lacks {name!r}; restore the file")
    if kind == "llama3" and fields.low_freq_factor == fields.high_freq_factor:
        raise CheckpointError(
            f"{source}: low_freq_factor and high_freq_factor of rope are equal; restore the file"
        )
    theta = fields.rope_theta or raw.rope_theta or 10000.0
    if theta <= 1:
        raise CheckpointError(f"{source}: rope_theta is {theta}, not above 1; restore the file")
    return _rope_config(msgspec.convert(kind, RopeKind), theta, fields, raw)


def _rope_config(kind: RopeKind, theta: float, fields: RopeFields, raw: HfConfig) -> RopeConfig:
    original = fields.original_max_position_embeddings or float(raw.max_position_embeddings)
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=fields.factor or 1.0,
        original_context_tokens=original if kind in ("llama3", "yarn") else 0.0,
        low_freq_factor=fields.low_freq_factor or 1.0,
        high_freq_factor=fields.high_freq_factor or 4.0,
        beta_fast=fields.beta_fast or 32.0,
        beta_slow=fields.beta_slow or 1.0,
        attention_factor=fields.attention_factor,
        mscale=fields.mscale,
        mscale_all_dim=fields.mscale_all_dim,
        truncate=True if fields.truncate is None else fields.truncate,
    )


def _context_tokens(raw: HfConfig, rope: RopeConfig) -> int:
    # Users switch yarn on by adding it, and leave max_position_embeddings at the trained length.
    if rope.kind != "yarn":
        return raw.max_position_embeddings
    stretched = min(int(rope.original_context_tokens * rope.factor), MAX_COUNT)
    return max(raw.max_position_embeddings, stretched)

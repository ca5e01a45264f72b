"""Llama: biases where config.json asks for them, no norm on queries and keys."""

from aegaeon.models.families import Features, HfConfig


def features(raw: HfConfig) -> Features:
    """Return what sets a Llama apart."""
    return Features(
        qkv_bias=raw.attention_bias,
        output_bias=raw.attention_bias,
        mlp_bias=raw.mlp_bias,
        qk_norm=False,
    )

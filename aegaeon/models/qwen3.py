"""Qwen3 (dense): an RMS norm per head on queries and keys; a sliding window is refused."""

from aegaeon.models.families import Features, HfConfig, refuse_sliding_window


def features(raw: HfConfig) -> Features:
    """Return what sets a Qwen3 apart. Raises UnsupportedModel for an active sliding window."""
    refuse_sliding_window(raw)
    return Features(
        qkv_bias=raw.attention_bias,
        output_bias=raw.attention_bias,
        mlp_bias=False,
        qk_norm=True,
        default_head_dim=128,
    )

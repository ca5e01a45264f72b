"""Qwen2 and Qwen2.5: biases on queries, keys and values, always; a sliding window is refused."""

from aegaeon.models.families import Features, HfConfig, refuse_sliding_window


def features(raw: HfConfig) -> Features:
    """Return what sets a Qwen2 apart. Raises UnsupportedModel for an active sliding window."""
    refuse_sliding_window(raw)
    return Features(qkv_bias=True, output_bias=False, mlp_bias=False, qk_norm=False)

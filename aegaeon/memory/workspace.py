"""What a forward pass holds beside weights and KV, estimated from the configuration. No torch."""

from aegaeon.models.config import ModelConfig

# Bounds the activations of a pass; where a prompt is cut never shows in the tokens.
MAX_PASS_ROWS = 512
# Query rows of one piece of a prompt: bounds the scores held, and skips keys no row may see.
PIECE_ROWS = 128
# Keys that attention looks at together.
SPLIT_TOKENS = 256
FLOAT_BYTES = 4


# What a workspace is rounded up to (csrc/ops/cpu/workspace.cpp).
HUGE_PAGE_BYTES = 2 << 20


def pass_bytes(config: ModelConfig) -> int:
    """Return the bytes of activations and scores of a pass of MAX_PASS_ROWS rows, at its peak.

    Counts what a recorded step needs together in the layer's wider half (csrc/ops/cpu/step_plan.h),
    what it begins with, and the widest operand of a product, of which the CPU keeps a copy between
    passes (csrc/ops/cpu/linear.cpp).
    """
    queries = config.heads * config.head_dim
    keys_values = 2 * config.kv_heads * config.head_dim
    residual = 2 * config.hidden_size  # before and after a norm, or a sum
    attention = 2 * (queries + keys_values)  # projected, and normed or rotated
    inner = 3 * config.intermediate_size  # gate and up, their product
    given = config.hidden_size + 4 * config.head_dim  # the embeddings, the angles
    packed = max(config.hidden_size, queries, config.intermediate_size)
    rows = MAX_PASS_ROWS * (residual + max(attention, inner) + given + packed)
    scores = 3 * PIECE_ROWS * config.heads * SPLIT_TOKENS  # with the mask and the weights
    return FLOAT_BYTES * (rows + scores) + HUGE_PAGE_BYTES


def sequence_bytes(config: ModelConfig) -> int:
    """Return the bytes that a pass holds for each of its sequences: a split of its keys and values,
    gathered, and its logits, copied once for sampling."""
    gathered = 2 * 2 * SPLIT_TOKENS * config.kv_heads * config.head_dim
    return FLOAT_BYTES * (gathered + 2 * config.vocab_tokens)

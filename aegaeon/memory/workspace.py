"""What a forward pass holds beside weights and KV, estimated from the configuration. No torch."""

from aegaeon.models.config import ModelConfig

# Bounds the activations of a pass; where a prompt is cut never shows in the tokens.
MAX_PASS_ROWS = 512
# Query rows of one piece of a prompt: bounds the scores held, and skips keys no row may see.
PIECE_ROWS = 128
# Keys that attention looks at together.
SPLIT_TOKENS = 256
FLOAT_BYTES = 4


def pass_bytes(config: ModelConfig) -> int:
    """Return the bytes of activations and scores of a pass of MAX_PASS_ROWS rows, at its peak.

    Counts what is alive together in the layer's wider half, temporaries included, and the widest
    operand of a product, of which the CPU keeps a copy between passes (csrc/ops/cpu/linear.cpp).
    """
    queries = config.heads * config.head_dim
    keys_values = 2 * config.kv_heads * config.head_dim
    residual = 4 * config.hidden_size  # before and after the norm, what is added, the sum
    attention = 2 * (queries + keys_values) + 3 * queries  # projected, normed, rotated, mixed
    inner = 5 * config.intermediate_size  # gate and up, exp and quotient, their product
    packed = max(config.hidden_size, queries, config.intermediate_size)
    rows = MAX_PASS_ROWS * (residual + max(attention, inner) + packed)
    scores = 3 * PIECE_ROWS * config.heads * SPLIT_TOKENS  # with the mask and the weights
    return FLOAT_BYTES * (rows + scores)


def sequence_bytes(config: ModelConfig) -> int:
    """Return the bytes that a pass holds for each of its sequences: a split of its keys and values,
    gathered, its logits, and what sampling makes of them (csrc/ops/cpu/sampling.cpp): weights and
    their indices, and ids and logits of the highest."""
    gathered = 2 * 2 * SPLIT_TOKENS * config.kv_heads * config.head_dim
    return FLOAT_BYTES * (gathered + (1 + 6) * config.vocab_tokens)

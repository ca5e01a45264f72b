"""What a forward pass holds beside weights and KV, estimated from the configuration. No torch."""

from aegaeon.models.config import ModelConfig

# Bounds the activations of a pass; where a prompt is cut never shows in the tokens.
MAX_PASS_ROWS = 512
# Of attention (csrc/ops/cpu/attention.cpp): tokens of a split, and floats that splits may take
# while they wait to be joined, those of single rows aside.
SPLIT_TOKENS = 512
MOST_WAITING = 4 << 20
FLOAT_BYTES = 4
# Sums of blocks and bins of weights (csrc/ops/cpu/sampling_select.cpp).
SAMPLING_SUMS_BYTES = 64 << 10
# What a workspace is rounded up to (csrc/ops/cpu/workspace.cpp).
HUGE_PAGE_BYTES = 2 << 20


def pass_bytes(config: ModelConfig) -> int:
    """Return the bytes of activations and scores of a pass of MAX_PASS_ROWS rows, at its peak.

    Counts what a recorded step needs together, what it begins with, and what the CPU keeps between
    passes: a copy of the widest operand of a product (csrc/ops/cpu/linear_operand.cpp), and splits
    of attention.
    """
    given = config.hidden_size + 4 * config.head_dim  # the embeddings, the angles
    packed = max(config.hidden_size, config.heads * config.head_dim, config.intermediate_size)
    rows = MAX_PASS_ROWS * (step_floats(config) + given + packed)
    waiting = min(MAX_PASS_ROWS * waiting_floats(config), MOST_WAITING)
    return FLOAT_BYTES * (rows + waiting) + HUGE_PAGE_BYTES


def step_floats(config: ModelConfig) -> int:
    """Return the floats that a recorded step (csrc/ops/cpu/step_plan.h) needs together for a row,
    in the layer's wider half."""
    residual = 2 * config.hidden_size  # before and after a norm, or a sum
    # Projected, and normed or rotated.
    attention = 2 * (config.heads + 2 * config.kv_heads) * config.head_dim
    inner = config.intermediate_size  # gate times up, which are in nobody's memory by themselves
    return residual + max(attention, inner)


def sequence_bytes(config: ModelConfig) -> int:
    """Return the bytes that a pass holds for each of its sequences: the splits of one row's
    attention, and its logits."""
    return FLOAT_BYTES * (waiting_floats(config) + config.vocab_tokens)


def sampling_bytes(vocab_tokens: int) -> int:
    """Return the bytes that a thread keeps once it has drawn a token (csrc/ops/cpu/sampling.cpp):
    weights in float64, indices of the heaviest, and up to twice as much as a vocabulary takes of
    what grows while it is filled, the ids and logits of the highest and a copy to select from."""
    return FLOAT_BYTES * (2 + 1 + 3 * 2) * vocab_tokens + SAMPLING_SUMS_BYTES


def waiting_floats(config: ModelConfig) -> int:
    """Return the floats of all splits of one row: of each head its sums, and its softmax."""
    splits = -(-config.context_tokens // SPLIT_TOKENS)
    return splits * config.heads * (config.head_dim + 2)

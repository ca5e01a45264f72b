"""What a CUDA device needs for steps beside weights and KV, by the configurations. No torch."""

from collections.abc import Iterable

import msgspec

from aegaeon.memory.workspace import (
    FLOAT_BYTES,
    MAX_PASS_ROWS,
    SPLIT_TOKENS,
    step_floats,
)
from aegaeon.models.config import ModelConfig

# Rows of a product (device/products.py), to which those of outputs are rounded up.
TILE_ROWS = 128
# Of csrc/ops/cuda: rows that are drawn side by side, bytes of a draw and its token.
DRAWN_ROWS = 32
DRAW_BYTES = 64
# What becomes of a sum is in no sum's memory on the way: gate and up lie beside what they make.
GATED_SLOTS = 3
BLOCK_TOKENS = 16
WORD_BYTES = 4
# What torch gives cuBLAS on the newest devices, on each of two streams: that which computes, and
# that on which steps are recorded.
CUBLAS_BYTES = 32 << 20


class RoomBytes(msgspec.Struct, frozen=True):
    """Bytes of each of device/cuda_room.py's rooms."""

    slots: int = 0
    result: int = 0
    upload: int = 0
    splits: int = 0
    draws: int = 0
    rows: int = 0  # of the largest decode that it is for, a power of two

    @property
    def total_bytes(self) -> int:
        """Of all."""
        return self.slots + self.result + self.upload + self.splits + self.draws


def room_bytes(configs: Iterable[ModelConfig], max_batch: int) -> RoomBytes:
    """Return what steps of these models need, where at most `max_batch` sequences have a row each.

    Only a pass of which more logits are wanted, such as one that scores a prompt, needs more: it
    gets that then.
    """
    sizes = [_room_of(config, min(max_batch, MAX_PASS_ROWS)) for config in configs]
    fields = RoomBytes.__struct_fields__
    return RoomBytes(*(max((getattr(one, name) for one in sizes), default=0) for name in fields))


def cuda_workspace_bytes(configs: Iterable[ModelConfig], max_batch: int) -> int:
    """Return all that steps of these models take of a device, cuBLAS's own memory included."""
    return room_bytes(configs, max_batch).total_bytes + 2 * CUBLAS_BYTES


def _room_of(config: ModelConfig, sequences: int) -> RoomBytes:
    splits = -(-config.context_tokens // SPLIT_TOKENS)
    bucket = 1 << (sequences - 1).bit_length()  # rows of a recorded step
    outputs = -(-bucket // TILE_ROWS) * TILE_ROWS
    # Of a recorded step, sums in powers of two.
    split_floats = config.heads * (config.head_dim + 2) * (1 << max(splits - 1, 0).bit_length())
    blocks = sequences * -(-config.context_tokens // BLOCK_TOKENS)
    # Ids, angles, the rows that are wanted; places, tiles; ids of blocks; and until the embedding
    # is in, a row of it for each token, in the type of the file: float32 at most.
    row_words = 2 + 2 * config.head_dim + 2 + 2 + 6 * config.heads + config.hidden_size
    vocab = config.vocab_tokens
    return RoomBytes(
        slots=MAX_PASS_ROWS * FLOAT_BYTES * cuda_step_floats(config),
        result=outputs * FLOAT_BYTES * vocab,
        upload=WORD_BYTES * (MAX_PASS_ROWS * row_words + blocks),
        splits=FLOAT_BYTES * bucket * split_floats if splits > 1 else 0,
        draws=bucket * DRAW_BYTES + min(bucket, DRAWN_ROWS) * (17 * vocab + 64),
        rows=bucket,
    )


def cuda_step_floats(config: ModelConfig) -> int:
    """Return the floats that a recorded step needs together for a row: those of the CPU's, gate and
    up, and what is narrowed to be multiplied."""
    narrowed = max(config.hidden_size, config.heads * config.head_dim)
    return step_floats(config) + (GATED_SLOTS - 1) * config.intermediate_size + narrowed

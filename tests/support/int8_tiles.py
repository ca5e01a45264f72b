"""Tiles of int8 as csrc/ops/ops.h has them, said by numpy."""

import numpy as np

TILE_ROWS, GROUP_COLUMNS = 32, 64


def rounded(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 weights [rows, columns] and bf16 scales, as uint16 [rows, groups], of a float32
    matrix."""
    rows, columns = matrix.shape
    groups = -(-columns // GROUP_COLUMNS)
    padded = np.zeros((rows, groups * GROUP_COLUMNS), np.float32)
    padded[:, :columns] = matrix
    padded = padded.reshape(rows, groups, GROUP_COLUMNS)
    exact = np.abs(padded).max(-1) / np.float32(127)
    bits = (exact.view(np.uint32).astype(np.uint64) + 0xFFFF) >> 16  # up, to what bf16 holds
    bits[(bits == 0) & (np.abs(padded).max(-1) > 0)] = 1
    scales = (bits << 16).astype(np.uint32).view(np.float32)
    divisors = np.where(scales == 0, np.float32(1), scales)
    weights = np.rint(padded / divisors[..., None]).astype(np.int8)
    return weights.reshape(rows, -1)[:, :columns], bits.astype(np.uint16)


def int8_tiles(matrix: np.ndarray) -> np.ndarray:
    """Return the bytes, [1, n], of a float32 matrix in tiles."""
    rows, columns = matrix.shape
    count = -(-rows // TILE_ROWS) * TILE_ROWS
    weights, scales = rounded(matrix)
    even = columns + columns % 2
    all_weights = np.zeros((count, even), np.int8)
    all_weights[:rows, :columns] = weights
    all_scales = np.zeros((count, scales.shape[1]), np.uint16)
    all_scales[:rows] = scales
    parts = []
    for row in range(0, count, TILE_ROWS):
        for group in range(scales.shape[1]):
            parts.append(all_scales[row : row + TILE_ROWS, group].tobytes())
            first = group * GROUP_COLUMNS
            tile = all_weights[row : row + TILE_ROWS, first : min(first + GROUP_COLUMNS, even)]
            pairs = tile.reshape(TILE_ROWS, -1, 2)
            parts.append(pairs.transpose(1, 0, 2).tobytes())
    return np.frombuffer(b"".join(parts), np.uint8).reshape(1, -1)

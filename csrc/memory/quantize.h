// From the rows of a checkpoint to tiles of int8 (csrc/ops/ops.h): the one definition of how
// weights are rounded.
#pragma once

#include <cstddef>

#include "memory/pack.h"

namespace aegaeon::memory {

// Columns of a row that share a scale.
constexpr std::size_t kGroupColumns = 64;

// Bytes that a row takes in a tile; a tile has 32 of them.
constexpr std::size_t quantized_row_bytes(std::size_t columns) {
  return 2 * ((columns + kGroupColumns - 1) / kGroupColumns + (columns + 1) / 2);
}

// `rows` source rows of `columns` elements, one behind the other, as tiles. Elements are those that
// `convert` makes float32 of; with none, float32. `source` may be unaligned; `out` is aligned
// to 64. scale = max |weight| of the group / 127, up to the next bf16 (zero for zeros); weight =
// round to even(element / scale), within -127 .. 127. Returns false, and leaves something else
// behind, where an element is infinite or NaN.
bool quantize_tiles(const std::byte* source, std::byte* out, std::size_t rows, std::size_t columns,
                    Convert convert, Fate fate);

}  // namespace aegaeon::memory

// From the rows of a checkpoint to the layouts that kernels read: tiles, and wider elements.
#pragma once

#include <cstddef>
#include <cstdint>

namespace aegaeon::memory {

// Rows of one tile, whose elements of one column lie side by side.
constexpr std::size_t kTileRows = 32;

// What happens to packed tiles next: they are copied at once, and should lie in the processor's
// cache, or they stay where they are, and should not drive other things out of it.
enum class Fate { copied, kept };

enum class Convert : std::uint32_t { none = 0, bf16_to_f32 = 1, f16_to_f32 = 2 };

constexpr std::uint32_t kConvertCount = 3;

// `rows` source rows of `columns` elements, one behind the other, as tiles:
// out[ceil(rows / 32)][columns][32]; the missing rows of the last tile are zero. Elements have
// 2 or 4 bytes. `source` may be unaligned; `out` is aligned to 64.
void pack_tiles(const std::byte* source, std::byte* out, std::size_t rows, std::size_t columns,
                std::size_t element_bytes, Fate fate);

// The same for up to 32 rows that lie `row_bytes` apart, of which others may learn only behind a
// fence: streamed stores.
struct TileSource {
  const std::byte* first_row;
  std::size_t row_bytes;
  std::size_t rows;
  std::size_t columns;
};
void pack_tile(const TileSource& source, std::byte* out, std::size_t element_bytes, Fate fate);
void fence_tiles();

// `count` elements of 16 bits, at `source` (unaligned), as float32; exact, NaNs stay NaNs.
void widen(const std::byte* source, float* out, std::size_t count, Convert convert);

}  // namespace aegaeon::memory

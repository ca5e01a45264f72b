#include "memory/quantize.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace aegaeon::memory {
namespace {

constexpr std::size_t kLineBytes = 2 * kTileRows;

// A group of a tile, row by row as it comes; each row's bytes are pairs of columns.
struct Group {
  std::uint16_t scales[kTileRows];
  alignas(64) std::uint8_t weights[kTileRows][kGroupColumns];
};

// Up to the next bf16: what is divided by the scale stays within 127. Zero only of zero.
std::uint16_t scale_of(std::uint32_t largest_bits) {
  if (largest_bits == 0) return 0;
  float largest = 0;
  std::memcpy(&largest, &largest_bits, sizeof largest);
  const float exact = largest / 127.0f;
  std::uint32_t bits = 0;
  std::memcpy(&bits, &exact, sizeof bits);
  return static_cast<std::uint16_t>(std::max<std::uint32_t>(1, (bits + 0xffffu) >> 16));
}

// Returns false where an element is infinite or NaN.
bool quantize_row(const float* elements, std::uint16_t& scale_bits, std::uint8_t* weights) {
  // Of floats without their sign the bits have the same order, infinity and NaNs last.
  std::int32_t largest = 0;
  for (std::size_t at = 0; at < kGroupColumns; ++at) {
    std::int32_t bits = 0;
    std::memcpy(&bits, elements + at, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  if (largest >= 0x7f800000) return false;
  scale_bits = scale_of(static_cast<std::uint32_t>(largest));
  const std::uint32_t wide = std::uint32_t{scale_bits} << 16;
  float scale = 0;
  std::memcpy(&scale, &wide, sizeof scale);
  const float divisor = scale_bits == 0 ? 1.0f : scale;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added is rounded to an integer
  for (std::size_t at = 0; at < kGroupColumns; ++at) {
    const float shifted = elements[at] / divisor + kRound;
    std::uint32_t bits = 0;
    std::memcpy(&bits, &shifted, sizeof bits);
    weights[at] = static_cast<std::uint8_t>(bits);  // of a negative one, two's complement
  }
  return true;
}

// Up to 64 elements as float32, zero behind them.
void gather(const std::byte* source, std::size_t count, Convert convert, float* elements) {
  std::fill_n(elements + count, kGroupColumns - count, 0.0f);
  if (convert == Convert::none) {
    std::memcpy(elements, source, count * sizeof *elements);
  } else {
    widen(source, elements, count, convert);
  }
}

}  // namespace

bool quantize_tiles(const std::byte* source, std::byte* out, std::size_t rows, std::size_t columns,
                    Convert convert, Fate fate) {
  const std::size_t element_bytes = convert == Convert::none ? 4 : 2;
  const std::size_t row_bytes = columns * element_bytes;
  bool is_finite = true;
  for (std::size_t row = 0; row < rows; row += kTileRows, source += kTileRows * row_bytes) {
    const std::size_t count = std::min(kTileRows, rows - row);
    Group group{};  // rows that are missing stay zero
    for (std::size_t column = 0; column < columns; column += kGroupColumns) {
      const std::size_t width = std::min(kGroupColumns, columns - column);
      const std::byte* from = source + column * element_bytes;
      for (std::size_t at = 0; at < count; ++at, from += row_bytes) {
        float elements[kGroupColumns];
        gather(from, width, convert, elements);
        is_finite &= quantize_row(elements, group.scales[at], group.weights[at]);
      }
      const std::size_t pairs = (width + 1) / 2;
      std::memcpy(out, group.scales, kLineBytes);
      pack_tile(
          {reinterpret_cast<const std::byte*>(group.weights), kGroupColumns, kTileRows, pairs},
          out + kLineBytes, 2, fate);
      out += (1 + pairs) * kLineBytes;
    }
  }
  fence_tiles();
  return is_finite;
}

}  // namespace aegaeon::memory

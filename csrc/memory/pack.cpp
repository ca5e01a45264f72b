#include "memory/pack.h"

#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace aegaeon::memory {
namespace {

template <typename Element>
void pack_block(const TileSource& source, std::byte* out, std::size_t first_column) {
  for (std::size_t column = first_column; column < source.columns; ++column) {
    Element line[kTileRows] = {};
    const std::byte* from = source.first_row + column * sizeof(Element);
    for (std::size_t row = 0; row < source.rows; ++row, from += source.row_bytes) {
      std::memcpy(&line[row], from, sizeof(Element));
    }
    std::memcpy(out + column * sizeof line, line, sizeof line);
  }
}

#if defined(__SSE2__)

// Rows lie too far apart for the processor to fetch all of them ahead by itself.
constexpr std::size_t kPrefetchBytes = 256;

__m128i load(const std::byte* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

void store(std::byte* to, __m128i value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), value);
}

// `to` is aligned to 64.
void put(const std::byte* block, std::size_t bytes, std::byte* to, Fate fate) {
  if (fate == Fate::copied) {
    std::memcpy(to, block, bytes);
    return;
  }
  for (std::size_t at = 0; at < bytes; at += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + at), load(block + at));
  }
}

void prefetch(const std::byte* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }

// Eight rows of eight 16-bit elements become eight columns, `kTileRows` elements apart.
void transpose_8x8(const std::byte* source, std::size_t row_bytes, std::byte* out) {
  __m128i row[8];
  for (std::size_t at = 0; at < 8; ++at) row[at] = load(source + at * row_bytes);
  __m128i pair[8];
  for (std::size_t at = 0; at < 4; ++at) {
    pair[2 * at] = _mm_unpacklo_epi16(row[2 * at], row[2 * at + 1]);
    pair[2 * at + 1] = _mm_unpackhi_epi16(row[2 * at], row[2 * at + 1]);
  }
  for (std::size_t half = 0; half < 2; ++half) {
    const __m128i low01 = _mm_unpacklo_epi32(pair[half], pair[half + 2]);
    const __m128i high01 = _mm_unpackhi_epi32(pair[half], pair[half + 2]);
    const __m128i low23 = _mm_unpacklo_epi32(pair[half + 4], pair[half + 6]);
    const __m128i high23 = _mm_unpackhi_epi32(pair[half + 4], pair[half + 6]);
    std::byte* columns = out + half * 4 * kTileRows * 2;
    store(columns, _mm_unpacklo_epi64(low01, low23));
    store(columns + kTileRows * 2, _mm_unpackhi_epi64(low01, low23));
    store(columns + 2 * kTileRows * 2, _mm_unpacklo_epi64(high01, high23));
    store(columns + 3 * kTileRows * 2, _mm_unpackhi_epi64(high01, high23));
  }
}

// Four rows of four 32-bit elements.
void transpose_4x4(const std::byte* source, std::size_t row_bytes, std::byte* out) {
  const __m128i row0 = load(source), row1 = load(source + row_bytes);
  const __m128i row2 = load(source + 2 * row_bytes), row3 = load(source + 3 * row_bytes);
  const __m128i low01 = _mm_unpacklo_epi32(row0, row1), high01 = _mm_unpackhi_epi32(row0, row1);
  const __m128i low23 = _mm_unpacklo_epi32(row2, row3), high23 = _mm_unpackhi_epi32(row2, row3);
  store(out, _mm_unpacklo_epi64(low01, low23));
  store(out + kTileRows * 4, _mm_unpackhi_epi64(low01, low23));
  store(out + 2 * kTileRows * 4, _mm_unpacklo_epi64(high01, high23));
  store(out + 3 * kTileRows * 4, _mm_unpackhi_epi64(high01, high23));
}

// Packs a full tile up to the last whole cache line of its rows; returns the columns done. The
// loops take a line of each of a few rows at once: all 32, a power of two apart, would drive each
// other out of the first cache before the rest of their lines is used.
template <std::size_t kElement, std::size_t kSide, typename Transpose>
std::size_t pack_lines(const TileSource& tile, std::byte* out, Fate fate,
                       const Transpose& transpose) {
  constexpr std::size_t kLineColumns = 64 / kElement;
  const std::byte* const source = tile.first_row;
  const std::size_t row_bytes = tile.row_bytes;
  const std::size_t whole = tile.columns / kLineColumns * kLineColumns;
  alignas(64) std::byte block[kLineColumns * kTileRows * kElement];
  for (std::size_t column = 0; column < whole; column += kLineColumns) {
    for (std::size_t row = 0; row < kTileRows; ++row) {
      prefetch(source + row * row_bytes + column * kElement + kPrefetchBytes);
    }
    for (std::size_t row = 0; row < kTileRows; row += kSide) {
      for (std::size_t at = 0; at < kLineColumns; at += kSide) {
        transpose(source + row * row_bytes + (column + at) * kElement, row_bytes,
                  block + (at * kTileRows + row) * kElement);
      }
    }
    put(block, sizeof block, out + column * kTileRows * kElement, fate);
  }
  return whole;
}

std::size_t pack_whole_lines(const TileSource& source, std::byte* out, std::size_t element_bytes,
                             Fate fate) {
  return element_bytes == 2 ? pack_lines<2, 8>(source, out, fate, transpose_8x8)
                            : pack_lines<4, 4>(source, out, fate, transpose_4x4);
}

#else

std::size_t pack_whole_lines(const TileSource&, std::byte*, std::size_t, Fate) { return 0; }

#endif

float float_of(std::uint32_t bits) {
  float value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// In operations that all compile to vectors: whole matrices come this way.
float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7fffu;
  // 2^112 is what the two exponents' biases differ by; it makes subnormals normal as well.
  const float finite = float_of(magnitude << 13) * 0x1p112f;
  std::uint32_t bits = 0;
  std::memcpy(&bits, &finite, sizeof bits);
  // Infinity and NaN keep their fractions under the largest exponent.
  const std::uint32_t largest = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return float_of(sign | bits | largest);
}

template <typename Widen>
void widen_all(const std::byte* source, float* out, std::size_t count, const Widen& widen_one) {
  for (std::size_t at = 0; at < count; ++at) {
    std::uint16_t half = 0;
    std::memcpy(&half, source + at * sizeof half, sizeof half);
    out[at] = widen_one(half);
  }
}

}  // namespace

void pack_tile(const TileSource& source, std::byte* out, std::size_t element_bytes, Fate fate) {
  const std::size_t done =
      source.rows == kTileRows ? pack_whole_lines(source, out, element_bytes, fate) : 0;
  if (element_bytes == 2) {
    pack_block<std::uint16_t>(source, out, done);
  } else {
    pack_block<std::uint32_t>(source, out, done);
  }
}

void fence_tiles() {
#if defined(__SSE2__)
  _mm_sfence();  // so that who is told of it finds it
#endif
}

void pack_tiles(const std::byte* source, std::byte* out, std::size_t rows, std::size_t columns,
                std::size_t element_bytes, Fate fate) {
  const std::size_t row_bytes = columns * element_bytes;
  for (std::size_t row = 0; row < rows; row += kTileRows) {
    const std::size_t count = std::min(kTileRows, rows - row);
    pack_tile({source, row_bytes, count, columns}, out, element_bytes, fate);
    source += kTileRows * row_bytes;
    out += kTileRows * row_bytes;
  }
  fence_tiles();
}

void widen(const std::byte* source, float* out, std::size_t count, Convert convert) {
  if (convert == Convert::bf16_to_f32) {
    widen_all(source, out, count,
              [](std::uint16_t half) { return float_of(std::uint32_t{half} << 16); });
  } else {
    widen_all(source, out, count, half_to_float);
  }
}

}  // namespace aegaeon::memory

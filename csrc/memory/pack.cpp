#include "memory/pack.h"

#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace aegaeon::memory {
namespace {

template <typename Element>
void pack_block(const std::byte* source, std::byte* out, std::size_t rows, std::size_t columns,
                std::size_t first_column) {
  const std::size_t row_bytes = columns * sizeof(Element);
  for (std::size_t column = first_column; column < columns; ++column) {
    Element line[kTileRows] = {};
    for (std::size_t row = 0; row < rows; ++row) {
      std::memcpy(&line[row], source + row * row_bytes + column * sizeof(Element), sizeof(Element));
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
std::size_t pack_lines(const std::byte* source, std::byte* out, std::size_t columns, Fate fate,
                       const Transpose& transpose) {
  constexpr std::size_t kLineColumns = 64 / kElement;
  const std::size_t row_bytes = columns * kElement;
  const std::size_t whole = columns / kLineColumns * kLineColumns;
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

std::size_t pack_whole_lines(const std::byte* source, std::byte* out, std::size_t columns,
                             std::size_t element_bytes, Fate fate) {
  return element_bytes == 2 ? pack_lines<2, 8>(source, out, columns, fate, transpose_8x8)
                            : pack_lines<4, 4>(source, out, columns, fate, transpose_4x4);
}

#else

std::size_t pack_whole_lines(const std::byte*, std::byte*, std::size_t, std::size_t, Fate) {
  return 0;
}

#endif

float float_of(std::uint32_t bits) {
  float value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16;
  const std::uint32_t exponent = half >> 10 & 0x1f;
  const std::uint32_t fraction = half & 0x3ffu;
  if (exponent == 31) {
    return float_of(sign | 0x7f800000u | fraction << 13);
  }
  if (exponent == 0) {
    constexpr float kSmallest = 1.0f / (1 << 24);  // of the subnormal halves
    const float value = static_cast<float>(fraction) * kSmallest;
    return sign != 0 ? -value : value;
  }
  return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

}  // namespace

void pack_tiles(const std::byte* source, std::byte* out, std::size_t rows, std::size_t columns,
                std::size_t element_bytes, Fate fate) {
  const std::size_t tile_bytes = kTileRows * columns * element_bytes;
  for (std::size_t row = 0; row < rows; row += kTileRows) {
    const std::size_t count = std::min(kTileRows, rows - row);
    const std::size_t done =
        count == kTileRows ? pack_whole_lines(source, out, columns, element_bytes, fate) : 0;
    if (element_bytes == 2) {
      pack_block<std::uint16_t>(source, out, count, columns, done);
    } else {
      pack_block<std::uint32_t>(source, out, count, columns, done);
    }
    source += tile_bytes;
    out += tile_bytes;
  }
#if defined(__SSE2__)
  _mm_sfence();  // so that who is told of it finds it
#endif
}

void widen(const std::byte* source, float* out, std::size_t count, Convert convert) {
  for (std::size_t at = 0; at < count; ++at) {
    std::uint16_t half = 0;
    std::memcpy(&half, source + at * sizeof half, sizeof half);
    out[at] =
        convert == Convert::bf16_to_f32 ? float_of(std::uint32_t{half} << 16) : half_to_float(half);
  }
}

}  // namespace aegaeon::memory

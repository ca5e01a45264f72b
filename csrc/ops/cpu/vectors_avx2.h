// Vectors of floats on AVX2, FMA and F16C; included by files that are compiled for them, and by no
// others.
#pragma once

#include <immintrin.h>

#include <cstddef>

namespace aegaeon::ops {
namespace {

struct Avx2Vectors {
  using Vector = __m256;
  static constexpr std::size_t kWidth = 8;
  // Of 16 registers: what is left beside a pair of what is loaded and two factors.
  static constexpr std::size_t kSums = 12;

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Vector vector) { _mm256_storeu_ps(to, vector); }
  static Vector broadcast(const float* from) { return _mm256_broadcast_ss(from); }
  static float multiply_add_one(float a, float b, float sum) { return __builtin_fmaf(a, b, sum); }
  static Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }

  // The even elements and the odd ones: two plain instructions where the order of memory would need
  // shuffles.
  static void load_bf16(const char* from, Vector& even, Vector& odd) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-0x10000)));
  }

  static Vector load_f16(const char* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }

  // Puts even and odd elements in order.
  static void interleave(Vector& low, Vector& high) {
    const Vector first = _mm256_unpacklo_ps(low, high);
    const Vector second = _mm256_unpackhi_ps(low, high);
    low = _mm256_permute2f128_ps(first, second, 0x20);
    high = _mm256_permute2f128_ps(first, second, 0x31);
  }
};

}  // namespace
}  // namespace aegaeon::ops

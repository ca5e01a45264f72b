// Vectors of floats on AVX-512F; included by files that are compiled for it, and by no others.
#pragma once

#include <immintrin.h>

#include <cstddef>

namespace aegaeon::ops {
namespace {

// The formulas and their order are those of AVX2, so are the bits.
struct Avx512Vectors {
  using Vector = __m512;
  static constexpr std::size_t kWidth = 16;
  static constexpr std::size_t kSums = 24;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Vector vector) { _mm512_storeu_ps(to, vector); }
  static Vector broadcast(const float* from) { return _mm512_set1_ps(*from); }
  static float multiply_add_one(float a, float b, float sum) { return __builtin_fmaf(a, b, sum); }
  static Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }

  // The even elements and the odd ones.
  static void load_bf16(const char* from, Vector& even, Vector& odd) {
    const __m512i both = _mm512_loadu_si512(from);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-0x10000)));
  }

  static Vector load_f16(const char* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }

  // Puts even and odd elements in order.
  static void interleave(Vector& low, Vector& high) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    const Vector even = low;
    low = _mm512_permutex2var_ps(even, first, high);
    high = _mm512_permutex2var_ps(even, second, high);
  }
};

}  // namespace
}  // namespace aegaeon::ops

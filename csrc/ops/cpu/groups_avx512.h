// What products with int8 weights have in common on AVX-512BW and AVX-512 VNNI; included by files
// that are compiled for them, and by no others.
#pragma once

#include <immintrin.h>

#include "ops/cpu/linear_groups.h"

namespace aegaeon::ops {
namespace {

struct Avx512Groups {
  using Integers = __m512i;
  typedef int Sums __attribute__((vector_size(64)));
  using Floats = __m512;
  static constexpr std::size_t kWidth = 16;
  static constexpr std::size_t kMaxRows = 12;
  static constexpr std::size_t kSums = 24;

  static Sums no_sum() { return Sums{}; }
  static Sums add(Sums a, Sums b) { return a + b; }
  static Integers widen(const char* bytes) {
    return _mm512_cvtepi8_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(bytes)));
  }
  static Integers broadcast_pair(const std::uint32_t* pair) {
    return _mm512_set1_epi32(static_cast<int>(*pair));
  }
  static Floats to_floats(Sums sums) {
    return _mm512_cvtepi32_ps(reinterpret_cast<Integers>(sums));
  }
  static Floats scales(const char* bf16) {
    const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(bf16));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Floats broadcast_scale(const std::uint32_t* bits) {
    return _mm512_castsi512_ps(broadcast_pair(bits));
  }
  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Floats vector) { _mm512_storeu_ps(to, vector); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats multiply_add_floats(Floats a, Floats b, Floats sum) {
    return _mm512_fmadd_ps(a, b, sum);
  }
};

}  // namespace
}  // namespace aegaeon::ops

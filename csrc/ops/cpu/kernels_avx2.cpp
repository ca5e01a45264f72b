// Compiled for AVX2, FMA and F16C (CMakeLists.txt); nothing here may be called without.
#if defined(__x86_64__)

#include <immintrin.h>

#include "ops/cpu/linear_groups.h"
#include "ops/cpu/linear_panel.h"
#include "ops/cpu/multiply_add.h"
#include "ops/cpu/row_kernels.h"
#include "ops/cpu/sampling_loops.h"

namespace aegaeon::ops {
namespace {

struct Avx2 {
  using Vector = __m256;
  using Weights = Vector;
  static constexpr std::size_t kWidth = 8;
  static constexpr std::size_t kMaxRows = 6;
  // Of 16 registers: what is left beside two vectors of weights and two factors.
  static constexpr std::size_t kSums = 12;

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Vector vector) { _mm256_storeu_ps(to, vector); }
  static Vector broadcast(const float* from) { return _mm256_broadcast_ss(from); }
  static Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }

  template <WeightType type>
  static constexpr std::size_t kWords = step_of(type).inputs;

  template <WeightType type>
  static Weights widen(const char* line, std::size_t vector, std::size_t word) {
    if constexpr (type == WeightType::bf16) {
      const __m256i pairs = _mm256_load_si256(reinterpret_cast<const __m256i*>(line) + vector);
      return _mm256_castsi256_ps(word == 0 ? _mm256_slli_epi32(pairs, 16)
                                           : _mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000)));
    } else if constexpr (type == WeightType::f16) {
      return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(line) + vector));
    } else {
      return _mm256_load_ps(reinterpret_cast<const float*>(line) + vector * kWidth);
    }
  }
};

struct Avx2Groups : Avx2 {
  using Integers = __m256i;
  typedef int Sums __attribute__((vector_size(32)));
  using Floats = __m256;

  static Sums no_sum() { return Sums{}; }
  static Sums add(Sums a, Sums b) { return a + b; }
  static Integers widen(const char* bytes) {
    return _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  static Integers broadcast_pair(const std::uint32_t* pair) {
    return _mm256_set1_epi32(static_cast<int>(*pair));
  }
  static Sums multiply_add(Integers weights, Integers pair, Sums sum) {
    return sum + reinterpret_cast<Sums>(_mm256_madd_epi16(weights, pair));
  }
  static Floats to_floats(Sums sums) {
    return _mm256_cvtepi32_ps(reinterpret_cast<Integers>(sums));
  }
  static Floats scales(const char* bf16) {
    const __m128i bits = _mm_load_si128(reinterpret_cast<const __m128i*>(bf16));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Floats broadcast_scale(const std::uint32_t* bits) {
    return _mm256_castsi256_ps(broadcast_pair(bits));
  }
  static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats multiply_add_floats(Floats a, Floats b, Floats sum) {
    return _mm256_fmadd_ps(a, b, sum);
  }
};

}  // namespace

PanelKernel avx2_kernel(WeightType type) {
  return type == WeightType::i8 ? group_kernel_of<Avx2Groups>() : kernel_of<Avx2>(type);
}

RowKernels avx2_rows() { return row_kernels_here(); }

SamplingKernel avx2_sampling() { return sampling_kernel(); }

std::size_t avx2_multiply_adds(std::size_t rounds) { return multiply_adds<Avx2>(rounds); }

}  // namespace aegaeon::ops

#endif

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
  static constexpr std::size_t kWidth = 8;
  static constexpr std::size_t kMaxRows = 6;
  // Of 16 registers: what is left beside a pair of weights and two factors.
  static constexpr std::size_t kSums = 12;

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Vector vector) { _mm256_storeu_ps(to, vector); }
  static Vector broadcast(const float* from) { return _mm256_broadcast_ss(from); }
  static Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }

  // Of bf16 the low vector takes the even elements, the high one the odd: two plain instructions
  // where the order of memory would need shuffles.
  template <WeightType type>
  static void widen_pair(const char* line, std::size_t pair, Vector& low, Vector& high) {
    if constexpr (type == WeightType::bf16) {
      const __m256i both = _mm256_load_si256(reinterpret_cast<const __m256i*>(line) + pair);
      low = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
      high = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-0x10000)));
    } else if constexpr (type == WeightType::f16) {
      const __m128i* const halves = reinterpret_cast<const __m128i*>(line) + 2 * pair;
      low = _mm256_cvtph_ps(_mm_load_si128(halves));
      high = _mm256_cvtph_ps(_mm_load_si128(halves + 1));
    } else {
      const float* const floats = reinterpret_cast<const float*>(line) + 2 * kWidth * pair;
      low = _mm256_load_ps(floats);
      high = _mm256_load_ps(floats + kWidth);
    }
  }

  template <WeightType type>
  static void finish(const float* sums, float* outputs) {
    for (std::size_t pair = 0; pair < kTileOutputs; pair += 2 * kWidth) {
      Vector low = load(sums + pair), high = load(sums + pair + kWidth);
      if constexpr (type == WeightType::bf16) {
        const Vector first = _mm256_unpacklo_ps(low, high);
        const Vector second = _mm256_unpackhi_ps(low, high);
        low = _mm256_permute2f128_ps(first, second, 0x20);
        high = _mm256_permute2f128_ps(first, second, 0x31);
      }
      store(outputs + pair, low);
      store(outputs + pair + kWidth, high);
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

RowKernels avx2_rows() { return {quantize_group, gate_tile}; }

SamplingKernel avx2_sampling() { return sampling_kernel(); }

std::size_t avx2_multiply_adds(std::size_t rounds) { return multiply_adds<Avx2>(rounds); }

}  // namespace aegaeon::ops

#endif

// Compiled for AVX2, FMA and F16C (CMakeLists.txt); nothing here may be called without.
#if defined(__x86_64__)

#include "ops/cpu/float_tiles.h"
#include "ops/cpu/linear_groups.h"
#include "ops/cpu/linear_panel.h"
#include "ops/cpu/multiply_add.h"
#include "ops/cpu/row_kernels.h"
#include "ops/cpu/sampling_loops.h"
#include "ops/cpu/vectors_avx2.h"

namespace aegaeon::ops {
namespace {

struct Avx2 : FloatTiles<Avx2Vectors> {
  static constexpr std::size_t kMaxRows = 6;
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

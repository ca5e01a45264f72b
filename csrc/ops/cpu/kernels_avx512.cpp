// Compiled for AVX-512F (CMakeLists.txt); nothing here may be called without.
#if defined(__x86_64__)

#include <immintrin.h>

#include "ops/cpu/linear_panel.h"
#include "ops/cpu/multiply_add.h"
#include "ops/cpu/row_kernels.h"
#include "ops/cpu/sampling_loops.h"

namespace aegaeon::ops {
namespace {

// The formulas and their order are those of AVX2, so are the bits.
struct Avx512 {
  using Vector = __m512;
  using Weights = Vector;
  static constexpr std::size_t kWidth = 16;
  static constexpr std::size_t kMaxRows = 12;
  static constexpr std::size_t kSums = 24;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Vector vector) { _mm512_storeu_ps(to, vector); }
  static Vector broadcast(const float* from) { return _mm512_set1_ps(*from); }
  static Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }

  template <WeightType type>
  static constexpr std::size_t kWords = step_of(type).inputs;

  template <WeightType type>
  static Weights widen(const char* line, std::size_t vector, std::size_t word) {
    if constexpr (type == WeightType::bf16) {
      const __m512i pairs = _mm512_load_si512(line + vector * sizeof(Vector));
      return _mm512_castsi512_ps(word == 0 ? _mm512_slli_epi32(pairs, 16)
                                           : _mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
    } else if constexpr (type == WeightType::f16) {
      return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(line) + vector));
    } else {
      return _mm512_load_ps(line + vector * sizeof(Vector));
    }
  }
};

}  // namespace

PanelKernel avx512_kernel(WeightType type) { return kernel_of<Avx512>(type); }

RowKernels avx512_rows() { return row_kernels_here(); }

SamplingKernel avx512_sampling() { return sampling_kernel(); }

std::size_t avx512_multiply_adds(std::size_t rounds) { return multiply_adds<Avx512>(rounds); }

}  // namespace aegaeon::ops

#endif

// Compiled for AVX-512F (CMakeLists.txt); nothing here may be called without.
#if defined(__x86_64__)

#include <immintrin.h>

#include "ops/cpu/linear_panel.h"
#include "ops/cpu/multiply_add.h"
#include "ops/cpu/row_kernels.h"
#include "ops/cpu/sampling_loops.h"

namespace aegaeon::ops {
namespace {

// One pair is a whole tile. The formulas and their order are those of AVX2, so are the bits.
struct Avx512 {
  using Vector = __m512;
  static constexpr std::size_t kWidth = 16;
  static constexpr std::size_t kMaxRows = 12;
  static constexpr std::size_t kSums = 24;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Vector vector) { _mm512_storeu_ps(to, vector); }
  static Vector broadcast(const float* from) { return _mm512_set1_ps(*from); }
  static Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }

  template <WeightType type>
  static void widen_pair(const char* line, std::size_t, Vector& low, Vector& high) {
    if constexpr (type == WeightType::bf16) {
      const __m512i both = _mm512_load_si512(line);
      low = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
      high = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-0x10000)));
    } else if constexpr (type == WeightType::f16) {
      const __m256i* const halves = reinterpret_cast<const __m256i*>(line);
      low = _mm512_cvtph_ps(_mm256_load_si256(halves));
      high = _mm512_cvtph_ps(_mm256_load_si256(halves + 1));
    } else {
      low = _mm512_load_ps(line);
      high = _mm512_load_ps(line + sizeof(Vector));
    }
  }

  template <WeightType type>
  static void finish(const float* sums, float* outputs) {
    Vector low = load(sums), high = load(sums + kWidth);
    if constexpr (type == WeightType::bf16) {
      const __m512i first =
          _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
      const Vector even = low;
      low = _mm512_permutex2var_ps(even, first, high);
      high = _mm512_permutex2var_ps(even, second, high);
    }
    store(outputs, low);
    store(outputs + kWidth, high);
  }
};

}  // namespace

PanelKernel avx512_kernel(WeightType type) { return kernel_of<Avx512>(type); }

RowKernels avx512_rows() { return {quantize_group, gate_tile}; }

SamplingKernel avx512_sampling() { return sampling_kernel(); }

std::size_t avx512_multiply_adds(std::size_t rounds) { return multiply_adds<Avx512>(rounds); }

}  // namespace aegaeon::ops

#endif

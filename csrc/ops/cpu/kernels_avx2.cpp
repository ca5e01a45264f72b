// Compiled for AVX2, FMA and F16C (CMakeLists.txt); nothing here may be called without.
#if defined(__x86_64__)

#include <immintrin.h>

#include "ops/cpu/attention_tile.h"
#include "ops/cpu/linear_panel.h"
#include "ops/cpu/multiply_add.h"
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
  static Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
  static float multiply_add_one(float a, float b, float sum) { return __builtin_fmaf(a, b, sum); }
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

}  // namespace

PanelKernel avx2_kernel(WeightType type) { return kernel_of<Avx2>(type); }

AttentionKernel avx2_attention() { return {Avx2::kMaxRows, attend_tile<Avx2>}; }

SamplingKernel avx2_sampling() { return sampling_kernel(); }

std::size_t avx2_multiply_adds(std::size_t rounds) { return multiply_adds<Avx2>(rounds); }

}  // namespace aegaeon::ops

#endif

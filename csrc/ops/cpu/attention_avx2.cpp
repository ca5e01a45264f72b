// Compiled for AVX2 and FMA (CMakeLists.txt); nothing here may be called without.
#if defined(__x86_64__)

#include <immintrin.h>

#include "ops/cpu/attention_split.h"

namespace aegaeon::ops {
namespace {

struct Avx2 {
  using Vector = __m256;
  static constexpr std::size_t kWidth = 8;
  static constexpr std::size_t kMaxQueries = 6;
  static constexpr std::size_t kFetchingQueries = 4;
  // Of 16 registers: what is left beside what is loaded and a factor.
  static constexpr std::size_t kSums = 12;

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Vector vector) { _mm256_storeu_ps(to, vector); }
  static Vector broadcast(const float* from) { return _mm256_broadcast_ss(from); }
  static float multiply_add_one(float a, float b, float sum) { return __builtin_fmaf(a, b, sum); }
  static Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }

  template <KvType type>
  static void load_pair(const char* from, Vector& low, Vector& high) {
    if constexpr (type == KvType::bf16) {
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      low = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
      high = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-0x10000)));
    } else {
      low = load(reinterpret_cast<const float*>(from));
      high = load(reinterpret_cast<const float*>(from) + kWidth);
    }
  }

  static void interleave(Vector& low, Vector& high) {
    const Vector first = _mm256_unpacklo_ps(low, high);
    const Vector second = _mm256_unpackhi_ps(low, high);
    low = _mm256_permute2f128_ps(first, second, 0x20);
    high = _mm256_permute2f128_ps(first, second, 0x31);
  }
};

}  // namespace

AttentionKernel avx2_attention(KvType type) { return attention_of<Avx2>(type); }

}  // namespace aegaeon::ops

#endif

// Compiled for AVX-512BW and BF16 (CMakeLists.txt); nothing here may be called without.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>

#include "ops/cpu/linear_panel.h"
#include "ops/cpu/multiply_add.h"
#include "ops/cpu/vectors_avx512.h"

namespace aegaeon::ops {
namespace {

// Pairs of bf16, whose products are exact in float32; the odd one's is added to the sum first, then
// the even one's, each rounded: the bits are those of float kernels on x that was rounded before,
// but that subnormal factors and sums count as zero.
struct Avx512Bf16 : Avx512Vectors {
  using Weights = __m512bh;
  static constexpr std::size_t kMaxRows = 12;

  template <WeightType type>
  static constexpr std::size_t kWords = 1;

  template <WeightType type>
  static Weights widen(const char* line, std::size_t vector, std::size_t) {
    static_assert(type == WeightType::bf16);
    return reinterpret_cast<Weights>(_mm512_load_si512(line + vector * sizeof(Vector)));
  }

  static Weights broadcast(const float* pair) {
    return reinterpret_cast<Weights>(_mm512_set1_ps(*pair));
  }

  static Vector multiply_add(Weights a, Weights b, Vector sum) {
    return _mm512_dpbf16_ps(sum, a, b);
  }
};

}  // namespace

PanelKernel avx512_bf16_pair_kernel() {
  return {Avx512Bf16::kMaxRows, accumulate<Avx512Bf16, WeightType::bf16>, XForm::pairs};
}

// As multiply_adds, but that the sums only grow, to where one more changes nothing.
std::size_t avx512_bf16_multiply_adds(std::size_t rounds) {
  using V = Avx512Bf16;
  constexpr std::size_t chains = 12;
  const volatile std::uint32_t ones = 0x3F803F80;  // a pair; the compiler must not know it
  const V::Weights factor = reinterpret_cast<V::Weights>(_mm512_set1_epi32(static_cast<int>(ones)));
  V::Vector sums[chains];
  unroll<chains>([&](auto i) { sums[i.at] = V::zero(); });
  for (std::size_t round = 0; round < rounds; ++round) {
    unroll<chains>([&](auto i) { sums[i.at] = V::multiply_add(factor, factor, sums[i.at]); });
  }
  volatile float seen = 0;
  unroll<chains>([&](auto i) { seen = seen + _mm512_cvtss_f32(sums[i.at]); });
  return rounds * chains * V::kWidth * 2 * 2;
}

}  // namespace aegaeon::ops

#endif

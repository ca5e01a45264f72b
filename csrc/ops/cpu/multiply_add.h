// Chains of multiply-adds in registers, for any vector type: the most that a thread computes.
#pragma once

#include <cstddef>

#include "ops/cpu/unroll.h"

namespace aegaeon::ops {

// Each returns the floating-point operations of `rounds` rounds.
std::size_t baseline_multiply_adds(std::size_t rounds);
std::size_t avx2_multiply_adds(std::size_t rounds);
std::size_t avx512_multiply_adds(std::size_t rounds);
std::size_t avx512_bf16_multiply_adds(std::size_t rounds);  // of pairs

// Enough chains to hide an operation's latency, few enough for the registers; `V` is as in
// linear_panel.h.
template <typename V>
std::size_t multiply_adds(std::size_t rounds) {
  constexpr std::size_t chains = V::kSums < 10 ? 5 : 10;
  // The compiler must not know that every chain tends to 2.
  const volatile float half = 0.5F, one = 1.0F;
  const float factors[] = {half, one};
  const typename V::Vector factor = V::broadcast(factors), added = V::broadcast(factors + 1);
  typename V::Vector sums[chains];
  unroll<chains>([&](auto i) { sums[i.at] = added; });
  for (std::size_t round = 0; round < rounds; ++round) {
    unroll<chains>([&](auto i) { sums[i.at] = V::multiply_add(sums[i.at], factor, added); });
  }
  volatile float seen = 0;
  unroll<chains>([&](auto i) {
    float lanes[V::kWidth];
    V::store(lanes, sums[i.at]);
    seen = seen + lanes[0];
  });
  return rounds * chains * V::kWidth * 2;
}

}  // namespace aegaeon::ops

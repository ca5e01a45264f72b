// How vectors read tiles of float weights: what linear_panel.h asks of its vector type.
#pragma once

#include <cstddef>

#include "ops/ops.h"

namespace aegaeon::ops {

// On the operations of `Vectors` (vectors_*.h).
template <typename Vectors>
struct FloatTiles : Vectors {
  using Vector = typename Vectors::Vector;
  using Vectors::kWidth;

  // Of bf16 the low vector takes the even elements, the high one the odd.
  template <WeightType type>
  [[gnu::always_inline]] static void widen_pair(const char* line, std::size_t pair, Vector& low,
                                                Vector& high) {
    constexpr std::size_t pair_bytes = 2 * kWidth * (type == WeightType::f32 ? 4 : 2);
    const char* const from = line + pair * pair_bytes;
    if constexpr (type == WeightType::bf16) {
      Vectors::load_bf16(from, low, high);
    } else if constexpr (type == WeightType::f16) {
      Vectors::load_f16(from, low, high);
    } else {
      low = Vectors::load(reinterpret_cast<const float*>(from));
      high = Vectors::load(reinterpret_cast<const float*>(from) + kWidth);
    }
  }

  template <WeightType type>
  static void finish(const float* sums, float* outputs) {
    for (std::size_t pair = 0; pair < kTileOutputs; pair += 2 * kWidth) {
      Vector low = Vectors::load(sums + pair), high = Vectors::load(sums + pair + kWidth);
      if constexpr (type == WeightType::bf16) Vectors::interleave(low, high);
      Vectors::store(outputs + pair, low);
      Vectors::store(outputs + pair + kWidth, high);
    }
  }
};

}  // namespace aegaeon::ops

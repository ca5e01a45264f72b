// How vectors read tiles of float weights: what linear_panel.h asks of its vector type.
#pragma once

#include <cstddef>

#include "ops/cpu/widen.h"
#include "ops/ops.h"

namespace aegaeon::ops {

// On the operations of `Vectors` (vectors_*.h).
template <typename Vectors>
struct FloatTiles : Vectors {
  using Vector = typename Vectors::Vector;
  using Weights = Vector;
  using Vectors::kWidth;

  template <WeightType type>
  static constexpr std::size_t kWords = step_of(type).inputs;

  template <WeightType type>
  [[gnu::always_inline]] static Vector widen(const char* line, std::size_t vector,
                                             std::size_t word) {
    const char* const from = line + vector * kWidth * step_of(type).bytes / kTileOutputs;
    if constexpr (type == WeightType::bf16) {
      Vector even, odd;
      Vectors::load_bf16(from, even, odd);
      return word == 0 ? even : odd;
    } else if constexpr (type == WeightType::f16) {
      return Vectors::load_f16(from);
    } else {
      return Vectors::load(reinterpret_cast<const float*>(from));
    }
  }
};

}  // namespace aegaeon::ops

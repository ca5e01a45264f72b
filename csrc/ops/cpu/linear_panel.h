// The inner loop of `linear`, for any vector type: a panel of rows times one tile of outputs.
#pragma once

#include <cstddef>

#include "ops/ops.h"

namespace aegaeon::ops {

// `sums` are 32 per row in an order that is the kernel's own, until `finish` has put them in order.
struct Panel {
  const float* x;  // [columns][rows]: what is multiplied with one line of weights lies together
  std::size_t rows;
  const void* weights;  // [columns][32]
  std::size_t columns;
  float* sums;    // [rows][32]
  bool is_first;  // the sums start at zero
};

struct PanelKernel {
  std::size_t max_rows;
  void (*accumulate)(const Panel& panel);
  void (*finish)(const float* sums, float* outputs);  // 32 each; may be the same
};

// Kernels by instruction set; those that the compiler's target lacks are not there.
PanelKernel baseline_kernel(WeightType type);
PanelKernel avx2_kernel(WeightType type);
PanelKernel avx512_kernel(WeightType type);

// `V` names a vector type and its operations. A pair is two vectors: V::widen_pair<type>(line, i)
// makes the i-th pair of a line of weights of them, and V::finish<type> undoes its order.
// Rows x pairs of sums stay in registers while all columns go by.
template <typename V, WeightType type, std::size_t rows, std::size_t pairs>
void accumulate_pairs(const Panel& panel, std::size_t first_pair) {
  using Vector = typename V::Vector;
  constexpr std::size_t line_bytes = kTileOutputs * (type == WeightType::f32 ? 4 : 2);
  Vector sums[rows][2 * pairs];
  float* const home = panel.sums + first_pair * 2 * V::kWidth;
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t v = 0; v < 2 * pairs; ++v) {
      sums[r][v] = panel.is_first ? V::zero() : V::load(home + r * kTileOutputs + v * V::kWidth);
    }
  }
  const char* line = static_cast<const char*>(panel.weights);
  const float* x = panel.x;
  for (std::size_t k = 0; k < panel.columns; ++k, line += line_bytes, x += rows) {
    for (std::size_t p = 0; p < pairs; ++p) {
      Vector low, high;
      V::template widen_pair<type>(line, first_pair + p, low, high);
      for (std::size_t r = 0; r < rows; ++r) {
        const Vector factor = V::broadcast(x + r);
        sums[r][2 * p] = V::multiply_add(low, factor, sums[r][2 * p]);
        sums[r][2 * p + 1] = V::multiply_add(high, factor, sums[r][2 * p + 1]);
      }
    }
  }
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t v = 0; v < 2 * pairs; ++v) {
      V::store(home + r * kTileOutputs + v * V::kWidth, sums[r][v]);
    }
  }
}

template <typename V, WeightType type, std::size_t rows>
void accumulate_rows(const Panel& panel) {
  constexpr std::size_t all = kTileOutputs / (2 * V::kWidth);
  constexpr std::size_t pairs = rows * 2 * all <= V::kSums ? all : 1;
  for (std::size_t pair = 0; pair < all; pair += pairs) {
    accumulate_pairs<V, type, rows, pairs>(panel, pair);
  }
}

// Finds the function of exactly panel.rows rows.
template <typename V, WeightType type, std::size_t rows = V::kMaxRows>
void accumulate(const Panel& panel) {
  if (panel.rows == rows) {
    accumulate_rows<V, type, rows>(panel);
  } else if constexpr (rows > 1) {
    accumulate<V, type, rows - 1>(panel);
  }
}

template <typename V>
PanelKernel kernel_of(WeightType type) {
  switch (type) {
    case WeightType::bf16:
      return {V::kMaxRows, accumulate<V, WeightType::bf16>, V::template finish<WeightType::bf16>};
    case WeightType::f16:
      return {V::kMaxRows, accumulate<V, WeightType::f16>, V::template finish<WeightType::f16>};
    default:
      return {V::kMaxRows, accumulate<V, WeightType::f32>, V::template finish<WeightType::f32>};
  }
}

}  // namespace aegaeon::ops

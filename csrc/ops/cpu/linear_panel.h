// The inner loop of `linear` on float weights, for any vector type: a panel of rows times one tile
// of outputs. That on int8 weights is in linear_groups.h.
#pragma once

#include <cstddef>

#include "ops/cpu/unroll.h"
#include "ops/ops.h"

namespace aegaeon::ops {

// `sums` are 32 per row in an order that is the kernel's own, until `finish` has put them in order.
struct Panel {
  // What is multiplied with one line of weights lies together: [columns][rows] floats, or, for
  // int8, group by group: [rows] scales, then [pairs][rows] pairs of 16 bits.
  const void* x;
  std::size_t rows;
  const void* weights;  // a tile from some line, or group, on
  std::size_t columns;
  float* sums;        // [rows][32]
  bool is_first;      // the sums start at zero
  std::size_t ahead;  // bytes; weights that are fetched into the second cache meanwhile
};

struct PanelKernel {
  std::size_t max_rows;
  void (*accumulate)(const Panel& panel);
  void (*finish)(const float* sums, float* outputs);  // 32 each; may be the same
};

// Kernels by instruction set; those that the compiler's target lacks are not there.
PanelKernel baseline_kernel(WeightType type);
PanelKernel avx2_kernel(WeightType type);
PanelKernel avx512_kernel(WeightType type);  // not i8, which needs more than AVX-512F
PanelKernel avx512bw_group_kernel();
PanelKernel avx512_vnni_group_kernel();

// `V` names a vector type and its operations. A pair is two vectors: V::widen_pair<type>(line, i)
// makes the i-th pair of a line of weights of them, and V::finish<type> undoes its order.
// Rows x pairs of sums stay in registers while all columns go by.
template <typename V, WeightType type, std::size_t rows, std::size_t pairs>
void accumulate_pairs(const Panel& panel, std::size_t first_pair) {
  using Vector = typename V::Vector;
  constexpr std::size_t line_bytes = kTileOutputs * (type == WeightType::f32 ? 4 : 2);
  constexpr std::size_t vectors = 2 * pairs;
  Vector sums[rows * vectors];
  float* const home = panel.sums + first_pair * 2 * V::kWidth;
  const bool is_first = panel.is_first;
  unroll<rows * vectors>([&](auto i) {
    const float* const from = home + i.at / vectors * kTileOutputs + i.at % vectors * V::kWidth;
    sums[i.at] = is_first ? V::zero() : V::load(from);
  });
  const char* line = static_cast<const char*>(panel.weights);
  const char* const end = line + panel.columns * line_bytes;
  const float* x = static_cast<const float*>(panel.x);
  for (; line != end; line += line_bytes, x += rows) {
    __builtin_prefetch(line + panel.ahead, 0, 2);
    unroll<pairs>([&](auto p) {
      Vector low, high;
      V::template widen_pair<type>(line, first_pair + p.at, low, high);
      unroll<rows>([&](auto r) {
        constexpr std::size_t at = r.at * vectors + 2 * p.at;
        const Vector factor = V::broadcast(x + r.at);
        sums[at] = V::multiply_add(low, factor, sums[at]);
        sums[at + 1] = V::multiply_add(high, factor, sums[at + 1]);
      });
    });
  }
  unroll<rows * vectors>([&](auto i) {
    V::store(home + i.at / vectors * kTileOutputs + i.at % vectors * V::kWidth, sums[i.at]);
  });
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

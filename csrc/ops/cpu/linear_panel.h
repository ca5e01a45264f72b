// The inner loop of `linear` on float weights, for any vector type: a panel of rows times one tile
// of outputs. That on int8 weights is in linear_groups.h.
#pragma once

#include <cstddef>

#include "ops/cpu/unroll.h"
#include "ops/cpu/widen.h"
#include "ops/ops.h"

namespace aegaeon::ops {

// What kernels read x as, so many words of four bytes for a row.
enum class XForm {
  floats,
  rounded,  // to bf16, still as floats
  pairs,    // of bf16: inputs 2 * j and 2 * j + 1 in a word, the former in its lower half
  groups,   // a scale, then pairs of 16-bit integers
};

constexpr std::size_t kXForms = 4;

constexpr std::size_t x_words(XForm form, std::size_t inputs) {
  switch (form) {
    case XForm::pairs:
      return inputs / 2;
    case XForm::groups:
      return group_lines(inputs);
    default:
      return inputs;
  }
}

struct Panel {
  // What is multiplied with one line of weights lies together: [words][rows]; of groups, group by
  // group: [rows] scales, then [pairs][rows].
  const void* x;
  std::size_t rows;
  const void* weights;  // a tile from some line, or group, on
  std::size_t columns;
  float* sums;        // [rows][32]
  bool is_first;      // the sums start at zero
  std::size_t ahead;  // bytes; weights that are fetched meanwhile
};

struct PanelKernel {
  std::size_t max_rows;
  void (*accumulate)(const Panel& panel);
  XForm form;
};

// Kernels by instruction set; those that the compiler's target lacks are not there.
PanelKernel baseline_kernel(WeightType type);
PanelKernel avx2_kernel(WeightType type);
PanelKernel avx512_kernel(WeightType type);  // not i8, which needs more than AVX-512F
PanelKernel avx512bw_group_kernel();
PanelKernel avx512_vnni_group_kernel();
PanelKernel avx512_bf16_pair_kernel();  // of bf16 with x of bf16

// `V` names a vector type and its operations. V::kWords<type> is how many words of x meet a line of
// weights; V::widen<type>(line, i, w) makes of the line what the w-th of them is multiplied with,
// for outputs from i * kWidth on. Rows x vectors of sums stay in registers while all columns go by.
template <typename V, WeightType type, std::size_t rows, std::size_t vectors>
void accumulate_vectors(const Panel& panel, std::size_t first_vector) {
  using Vector = typename V::Vector;
  constexpr Step step = step_of(type);
  constexpr std::size_t words = V::template kWords<type>;
  Vector sums[rows * vectors];
  float* const home = panel.sums + first_vector * V::kWidth;
  const bool is_first = panel.is_first;
  unroll<rows * vectors>([&](auto i) {
    const float* const from = home + i.at / vectors * kTileOutputs + i.at % vectors * V::kWidth;
    sums[i.at] = is_first ? V::zero() : V::load(from);
  });
  const char* line = static_cast<const char*>(panel.weights);
  const char* const end = line + panel.columns / step.inputs * step.bytes;
  const float* x = static_cast<const float*>(panel.x);
  for (; line != end; line += step.bytes, x += words * rows) {
    unroll<step.bytes / 64>([&](auto i) { __builtin_prefetch(line + panel.ahead + 64 * i.at); });
    unroll<words>([&](auto w) {
      constexpr std::size_t word = words - 1 - w.at;  // from the last: see LinearParams
      typename V::Weights weights[vectors];
      unroll<vectors>([&](auto v) {
        weights[v.at] = V::template widen<type>(line, first_vector + v.at, word);
      });
      unroll<rows>([&](auto r) {
        const auto factor = V::broadcast(x + word * rows + r.at);
        unroll<vectors>([&](auto v) {
          constexpr std::size_t at = r.at * vectors + v.at;
          sums[at] = V::multiply_add(weights[v.at], factor, sums[at]);
        });
      });
    });
  }
  unroll<rows * vectors>([&](auto i) {
    V::store(home + i.at / vectors * kTileOutputs + i.at % vectors * V::kWidth, sums[i.at]);
  });
}

template <typename V, WeightType type, std::size_t rows>
void accumulate_rows(const Panel& panel) {
  constexpr std::size_t all = kTileOutputs / V::kWidth;
  constexpr std::size_t vectors = rows * all <= V::kSums ? all : 2;
  for (std::size_t vector = 0; vector < all; vector += vectors) {
    accumulate_vectors<V, type, rows, vectors>(panel, vector);
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
      return {V::kMaxRows, accumulate<V, WeightType::bf16>, XForm::floats};
    case WeightType::f16:
      return {V::kMaxRows, accumulate<V, WeightType::f16>, XForm::floats};
    default:
      return {V::kMaxRows, accumulate<V, WeightType::f32>, XForm::floats};
  }
}

}  // namespace aegaeon::ops

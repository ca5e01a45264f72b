// The inner loop of `linear` on int8 weights, for any vector type: a panel of rows times the groups
// of one tile. Weights are widened once for all rows of the panel; a group's sums are integers,
// exact in any order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "ops/cpu/linear_panel.h"
#include "ops/cpu/unroll.h"
#include "ops/cpu/widen.h"
#include "ops/ops.h"

namespace aegaeon::ops {

// One group: its lines at `weights`, behind the scales, and x as Panel::x has it.
// `V` names vectors of kWidth 32-bit sums and their operations: V::widen(bytes) makes the int16
// pairs of kWidth outputs of 2 * kWidth int8; V::multiply_add(w, x, sum) adds both products of each
// pair to its sum. V::Sums is a vector of int by itself: arrays of the general __m512i, which may
// stand for anything, GCC leaves in memory.
template <typename V, std::size_t rows, std::size_t vectors>
void accumulate_group(const char* weights, const std::uint32_t* x, std::size_t lines,
                      std::size_t ahead, float* home, bool is_first) {
  using Integers = typename V::Integers;
  using Floats = typename V::Floats;
  // A single row waits for each sum's sum before: so every other line has sums of its own.
  constexpr std::size_t chains = rows == 1 ? 2 : 1, count = rows * vectors;
  typename V::Sums sums[chains * count];
  unroll<chains * count>([&](auto i) { sums[i.at] = V::no_sum(); });
  const char* line = weights + kGroupLineBytes;
  const std::uint32_t* pairs = x + rows;
  for (std::size_t at = 0; at < lines; at += chains) {
    unroll<chains>([&](auto chain) {
      if (chain.at > 0 && at + chain.at == lines) return;
      __builtin_prefetch(line + ahead);
      Integers wide[vectors];
      unroll<vectors>([&](auto v) { wide[v.at] = V::widen(line + 2 * v.at * V::kWidth); });
      unroll<rows>([&](auto r) {
        const Integers pair = V::broadcast_pair(pairs + r.at);
        unroll<vectors>([&](auto v) {
          constexpr std::size_t i = chain.at * count + r.at * vectors + v.at;
          sums[i] = V::multiply_add(wide[v.at], pair, sums[i]);
        });
      });
      line += kGroupLineBytes;
      pairs += rows;
    });
  }
  unroll<(chains - 1) * count>(
      [&](auto i) { sums[i.at] = V::add(sums[i.at], sums[count + i.at]); });
  unroll<vectors>([&](auto v) {
    const Floats scales = V::scales(weights + 2 * v.at * V::kWidth);
    unroll<rows>([&](auto r) {
      float* const sum = home + r.at * kTileOutputs + v.at * V::kWidth;
      const Floats part = V::multiply(V::to_floats(sums[r.at * vectors + v.at]), scales);
      const Floats before = is_first ? V::zero() : V::load(sum);
      V::store(sum, V::multiply_add_floats(part, V::broadcast_scale(x + r.at), before));
    });
  });
}

template <typename V, std::size_t rows, std::size_t vectors>
void accumulate_vectors(const Panel& panel, std::size_t first_output) {
  const char* weights = static_cast<const char*>(panel.weights) + 2 * first_output;
  const std::uint32_t* x = static_cast<const std::uint32_t*>(panel.x);
  bool is_first = panel.is_first;
  for (std::size_t left = panel.columns; left > 0; is_first = false) {
    const std::size_t inputs = left < kGroupInputs ? left : kGroupInputs;
    const std::size_t lines = (inputs + 1) / 2;
    accumulate_group<V, rows, vectors>(weights, x, lines, panel.ahead, panel.sums + first_output,
                                       is_first);
    weights += (1 + lines) * kGroupLineBytes;
    x += (1 + lines) * rows;
    left -= inputs;
  }
}

template <typename V, std::size_t rows>
void accumulate_group_rows(const Panel& panel) {
  constexpr std::size_t all = kTileOutputs / V::kWidth;
  constexpr std::size_t vectors = rows * all <= V::kSums ? all : rows * 2 <= V::kSums ? 2 : 1;
  for (std::size_t vector = 0; vector < all; vector += vectors) {
    accumulate_vectors<V, rows, vectors>(panel, vector * V::kWidth);
  }
}

// Finds the function of exactly panel.rows rows.
template <typename V, std::size_t rows = V::kMaxRows>
void accumulate_groups(const Panel& panel) {
  if (panel.rows == rows) {
    accumulate_group_rows<V, rows>(panel);
  } else if constexpr (rows > 1) {
    accumulate_groups<V, rows - 1>(panel);
  }
}

template <typename V>
PanelKernel group_kernel_of() {
  return {V::kMaxRows, accumulate_groups<V>, XForm::groups};
}

}  // namespace aegaeon::ops

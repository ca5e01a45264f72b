// The rows of x as the kernels of `linear` read them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/cpu/linear_panel.h"
#include "ops/cpu/panels.h"
#include "ops/cpu/thread_pool.h"

namespace aegaeon::ops {

struct Operand {
  const float* x;  // [rows, in_features]
  std::size_t in_features;
  Panels panels;

  std::size_t rows() const { return panels.first_row(panels.count()); }
};

using Word = std::uint32_t;

// What pack_operand writes: none where x is as the kernels read it.
std::size_t packed_words(const Operand& operand, XForm form);

// Lays the rows of each panel side by side, as Panel::x of `form` says: one panel behind the other,
// each of as many words for a row as x_words says. Returns `to`, or x itself where that is it.
const void* pack_operand(ThreadPool& pool, const Operand& operand, XForm form, Word* to);

}  // namespace aegaeon::ops

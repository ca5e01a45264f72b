// The rows of x as the kernels of `linear` read them.
#pragma once

#include <cstddef>

#include "ops/cpu/linear_panel.h"
#include "ops/cpu/panels.h"
#include "ops/cpu/thread_pool.h"

namespace aegaeon::ops {

struct Operand {
  const float* x;  // [rows, in_features]
  std::size_t in_features;
  Panels panels;
};

// Lays the rows of each panel side by side, as Panel::x of `form` says: one panel behind the other,
// each of as many words for a row as x_words says. What is returned is x itself where that is it,
// else kept until the next call of the calling thread for the same form.
const void* pack_operand(ThreadPool& pool, const Operand& operand, XForm form);

}  // namespace aegaeon::ops

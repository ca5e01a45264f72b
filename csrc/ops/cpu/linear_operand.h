// The rows of x as the kernels of `linear` read them.
#pragma once

#include <cstddef>

#include "ops/cpu/panels.h"
#include "ops/cpu/thread_pool.h"
#include "ops/ops.h"

namespace aegaeon::ops {

struct Operand {
  const float* x;  // [rows, in_features]
  std::size_t in_features;
  Panels panels;
};

// Lays the rows of each panel side by side, as Panel::x of a weight of `type` says: one panel
// behind the other, each of as many words for a row as x_words says. What is returned is x itself
// where that is it, else kept until the next call of the calling thread for the same kind of type.
const void* pack_operand(ThreadPool& pool, const Operand& operand, WeightType type);

}  // namespace aegaeon::ops

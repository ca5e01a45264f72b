#include "ops/cpu/linear_operand.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "ops/cpu/kernel_choice.h"
#include "ops/cpu/widen.h"

namespace aegaeon::ops {
namespace {

constexpr std::size_t kPanelsPerClaim = 8;

void pack_floats(const Operand& operand, std::size_t panel, float* packed) {
  const std::size_t rows = operand.panels.rows(panel), first = operand.panels.first_row(panel);
  float* const to = packed + first * operand.in_features;
  for (std::size_t r = 0; r < rows; ++r) {
    const float* const from = operand.x + (first + r) * operand.in_features;
    for (std::size_t k = 0; k < operand.in_features; ++k) {
      to[k * rows + r] = from[k];
    }
  }
}

// Rounds to 16 bits on the way.
void pack_groups(const Operand& operand, std::size_t panel, std::uint32_t* packed) {
  const auto quantize = row_kernels().quantize;
  const std::size_t rows = operand.panels.rows(panel), first = operand.panels.first_row(panel);
  std::uint32_t* to = packed + first * x_words(WeightType::i8, operand.in_features);
  for (std::size_t k = 0; k < operand.in_features; k += kGroupInputs) {
    const std::size_t inputs = std::min(kGroupInputs, operand.in_features - k);
    const std::size_t pairs = (inputs + 1) / 2;
    for (std::size_t r = 0; r < rows; ++r) {
      std::int16_t rounded[kGroupInputs];
      const float scale =
          quantize(operand.x + (first + r) * operand.in_features + k, inputs, rounded);
      std::memcpy(to + r, &scale, sizeof scale);
      for (std::size_t pair = 0; pair < pairs; ++pair) {
        std::memcpy(to + (1 + pair) * rows + r, rounded + 2 * pair, sizeof *to);
      }
    }
    to += (1 + pairs) * rows;
  }
}

// Memory of this thread that is as large as it ever was: aegaeon/memory/workspace.py counts it in
// what a pass takes.
template <typename Word>
Word* kept(std::size_t words) {
  thread_local std::vector<Word> memory;
  if (memory.size() < words) {
    memory = std::vector<Word>();  // first: what was there is written anew
    memory.resize(words);
  }
  return memory.data();
}

template <typename Word>
const void* pack_panels(ThreadPool& pool, const Operand& operand, Word* to,
                        void (*pack)(const Operand&, std::size_t, Word*)) {
  pool.for_ranges(operand.panels.count(), kPanelsPerClaim,
                  [&](std::size_t first, std::size_t last) {
                    for (std::size_t panel = first; panel < last; ++panel) {
                      pack(operand, panel, to);
                    }
                  });
  return to;
}

}  // namespace

const void* pack_operand(ThreadPool& pool, const Operand& operand, WeightType type) {
  const Panels& panels = operand.panels;
  const std::size_t rows = panels.first_row(panels.count());
  const std::size_t words = rows * x_words(type, operand.in_features);
  if (type == WeightType::i8) {
    return pack_panels(pool, operand, kept<std::uint32_t>(words), pack_groups);
  }
  if (panels.count() == rows) return operand.x;
  return pack_panels(pool, operand, kept<float>(words), pack_floats);
}

}  // namespace aegaeon::ops

#include "ops/cpu/linear_operand.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "ops/cpu/kernel_choice.h"
#include "ops/cpu/widen.h"

namespace aegaeon::ops {
namespace {

constexpr std::size_t kPanelsPerClaim = 8;

// Words of a row go to every `rows`-th word.
void spread(const Word* words, std::size_t count, Word* to, std::size_t rows) {
  for (std::size_t at = 0; at < count; ++at) to[at * rows] = words[at];
}

void pack_floats(const Operand& operand, std::size_t panel, Word* packed) {
  const std::size_t rows = operand.panels.rows(panel), first = operand.panels.first_row(panel);
  Word* const to = packed + first * operand.in_features;
  for (std::size_t r = 0; r < rows; ++r) {
    const float* const from = operand.x + (first + r) * operand.in_features;
    for (std::size_t k = 0; k < operand.in_features; ++k) {
      std::memcpy(to + k * rows + r, from + k, sizeof *to);
    }
  }
}

// Rounds to bf16 on the way; `round` makes words of a stretch of inputs.
template <XForm form>
void pack_rounded(const Operand& operand, std::size_t panel, Word* packed) {
  constexpr std::size_t kStretch = 256;
  const RowKernels kernels = row_kernels();
  const auto round = form == XForm::pairs ? kernels.round_pairs : kernels.round;
  const std::size_t rows = operand.panels.rows(panel), first = operand.panels.first_row(panel);
  Word* to = packed + first * x_words(form, operand.in_features);
  for (std::size_t k = 0; k < operand.in_features; k += kStretch) {
    const std::size_t inputs = std::min(kStretch, operand.in_features - k);
    const std::size_t words = x_words(form, inputs);
    for (std::size_t r = 0; r < rows; ++r) {
      Word rounded[kStretch];
      round(operand.x + (first + r) * operand.in_features + k, inputs, rounded);
      spread(rounded, words, to + r, rows);
    }
    to += words * rows;
  }
}

// Rounds to 16 bits on the way.
void pack_groups(const Operand& operand, std::size_t panel, Word* packed) {
  const auto quantize = row_kernels().quantize;
  const std::size_t rows = operand.panels.rows(panel), first = operand.panels.first_row(panel);
  Word* to = packed + first * x_words(XForm::groups, operand.in_features);
  for (std::size_t k = 0; k < operand.in_features; k += kGroupInputs) {
    const std::size_t inputs = std::min(kGroupInputs, operand.in_features - k);
    const std::size_t pairs = (inputs + 1) / 2;
    for (std::size_t r = 0; r < rows; ++r) {
      std::int16_t rounded[kGroupInputs];
      const float scale =
          quantize(operand.x + (first + r) * operand.in_features + k, inputs, rounded);
      std::memcpy(to + r, &scale, sizeof scale);
      Word words[kGroupInputs / 2];
      std::memcpy(words, rounded, sizeof words);
      spread(words, pairs, to + rows + r, rows);
    }
    to += (1 + pairs) * rows;
  }
}

using Pack = void (*)(const Operand&, std::size_t, Word*);

Pack pack_of(XForm form) {
  switch (form) {
    case XForm::rounded:
      return pack_rounded<XForm::rounded>;
    case XForm::pairs:
      return pack_rounded<XForm::pairs>;
    case XForm::groups:
      return pack_groups;
    default:
      return pack_floats;
  }
}

}  // namespace

std::size_t packed_words(const Operand& operand, XForm form) {
  const std::size_t rows = operand.rows();
  const bool is_there = form == XForm::floats && operand.panels.count() == rows;
  return is_there ? 0 : rows * x_words(form, operand.in_features);
}

const void* pack_operand(ThreadPool& pool, const Operand& operand, XForm form, Word* to) {
  if (packed_words(operand, form) == 0) return operand.x;
  const Pack pack = pack_of(form);
  pool.for_ranges(operand.panels.count(), kPanelsPerClaim,
                  [&](std::size_t first, std::size_t last) {
                    for (std::size_t panel = first; panel < last; ++panel) pack(operand, panel, to);
                  });
  return to;
}

}  // namespace aegaeon::ops

// What one sequence does to its logits before a token is drawn of them: penalties for tokens that
// it has, and what a client adds to some. Sparse; the tokens so far are all that it depends on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace aegaeon::ops {

// `repetition` 1, `presence` 0 and `frequency` 0 are off.
struct Penalties {
  double repetition;  // over 0; of tokens of prompt and answer
  double presence;    // of tokens of the answer
  double frequency;   // likewise, each time
};

// For a token that stands n times in the answer,
//   adjusted = repeated - presence * [n > 0] - frequency * n + bias, where
//   repeated = logit / repetition where that is positive, else logit * repetition,
// for tokens of prompt or answer, and the logit itself for others. In float64; what float32 cannot
// hold becomes its furthest.
class Adjustment {
 public:
  using Bias = std::vector<std::pair<std::uint32_t, double>>;

  Adjustment(const Penalties& penalties, const Bias& bias,
             const std::vector<std::uint32_t>& prompt);

  // One more token of the answer.
  void count(std::uint32_t id);
  // Changes logits [vocab] in place; ids beyond it are passed over.
  void apply(float* logits, std::size_t vocab) const;

 private:
  struct Entry {
    std::uint32_t id;
    bool is_repeated;
    std::uint64_t made;
    double bias;
  };

  Entry& entry_of(std::uint32_t id);

  Penalties penalties_;
  std::vector<Entry> entries_;
  std::unordered_map<std::uint32_t, std::size_t> places_;  // in entries_
};

// What is done to a row before its token is drawn; nothing where a member is null.
struct RowChange {
  const Adjustment* adjustment = nullptr;
  // Bit i % 32 of word i / 32: whether token i may be drawn. The row is drawn as if it had no other
  // tokens.
  const std::uint32_t* allowed = nullptr;

  bool is_any() const { return adjustment != nullptr || allowed != nullptr; }
};

}  // namespace aegaeon::ops

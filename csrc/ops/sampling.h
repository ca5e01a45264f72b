// Operators on logits: the next token of each row, and log-probabilities. All is in float64, sums
// in one order: a row's results are the same bits on any number of threads and in any company.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "ops/adjustment.h"
#include "ops/ops.h"

namespace aegaeon::ops {

// How one token is drawn; `temperature` 0 is greedy, `top_k` 0, `top_p` 1 and `min_p` 0 are off.
struct Draw {
  double temperature;
  std::size_t top_k;
  double top_p;
  double min_p;
  std::uint64_t seed;
  std::uint64_t position;
};

// Greedy takes the lowest id of the highest logit. Otherwise weights are exp((logit - highest) /
// temperature) of the top_k highest logits (ties with the k-th stay), of which top_p keeps the
// fewest heaviest whose sum reaches that share (of ties the lower ids), and min_p those that weigh
// at least so much of the heaviest. The token is the first id at which the sum of the weights kept,
// by id, exceeds uniform(seed, position) of all of it.
struct SampleParams {
  const float* logits;  // [rows, vocab]
  std::size_t rows;
  std::size_t vocab;                   // 1 .. 2^32 - 1
  const Draw* draws;                   // [rows]
  std::optional<std::size_t>* tokens;  // [rows]; none where a logit is infinite or NaN
  const RowChange* changes = nullptr;  // [rows], or null for none; none allowed: no token
};

// value(r, i) = logits[r][i] - log(sum over j of exp(logits[r][j])), of the chosen id and of the
// `best_count` ids of highest logit, highest first, of ties the lower id. Where a logit is infinite
// or NaN, all values of the row are NaN. Throws std::out_of_range for a chosen id outside the row.
struct LogProbParams {
  const float* logits;  // [rows, vocab]
  std::size_t rows;
  std::size_t vocab;          // 1 .. 2^32 - 1
  const std::size_t* chosen;  // [rows]
  std::size_t best_count;     // at most vocab
  double* chosen_values;      // [rows]
  std::size_t* best_ids;      // [rows, best_count]
  double* best_values;        // [rows, best_count]
};

void sample(ThreadPool& pool, const SampleParams& params);
void log_probabilities(ThreadPool& pool, const LogProbParams& params);

}  // namespace aegaeon::ops

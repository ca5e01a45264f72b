// How Python says which tokens of logits are drawn, on whichever device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "ops/sampling.h"

namespace aegaeon {

using LogitShape = std::pair<std::size_t, std::size_t>;  // rows, vocab
using DrawTuple = std::tuple<double, std::size_t, double, double, std::uint64_t, std::uint64_t>;

inline ops::Draw draw_of(const DrawTuple& given) {
  const auto& [temperature, top_k, top_p, min_p, seed, position] = given;
  return {temperature, top_k, top_p, min_p, seed, position};
}

// Throws std::invalid_argument, which Python sees as ValueError.
inline void check_logits(LogitShape shape, std::size_t rows) {
  if (shape.second < 1 || shape.second > std::numeric_limits<std::uint32_t>::max()) {
    throw std::invalid_argument("a vocabulary has 1 to 2^32 - 1 tokens, not " +
                                std::to_string(shape.second));
  }
  if (rows != shape.first) {
    throw std::invalid_argument(std::to_string(rows) + " tokens are asked of " +
                                std::to_string(shape.first) + " rows of logits");
  }
}

}  // namespace aegaeon

// Finds what lies above a threshold without sorting a vocabulary.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ops/cpu/sampling_kernel.h"

namespace aegaeon::ops {

// A row of logits and what find_highs noted of it.
struct HighRow {
  const float* logits;
  std::size_t count;
  const std::vector<float>& highs;
};

// The k-th highest logit, k in 1 .. count; `scratch` is overwritten.
float kth_highest(const HighRow& row, std::size_t k, std::vector<float>& scratch);

// The fewest, heaviest of some weights in (0, 1] whose sum reaches a bound; of ties the lower
// indices. Weights are counted by ranges of their bits, and the range where the sum reaches the
// bound is looked at closer, until it is short enough to sort.
class Nucleus {
 public:
  // Returns the least weight of those whose sum reaches `wanted`, and makes those of equal weight
  // that are not among them zero. 0: the sum of all, rounded, is below.
  double cut(const SamplingKernel& kernel, double* weights, std::size_t count, double wanted);

 private:
  bool look(const SamplingKernel& kernel, const double* weights, std::size_t count, double wanted);
  bool look_closer(const double* weights, double wanted, double least, double most);
  bool find_bin(double wanted, std::size_t& bin);
  double walk(double* weights, double wanted);

  std::vector<double> bins_;          // sums of weights
  std::vector<std::uint32_t> found_;  // indices, the first `length_`: the last one is among them
  std::size_t length_ = 0;
  double above_ = 0;  // sum of the weights above those
};

}  // namespace aegaeon::ops

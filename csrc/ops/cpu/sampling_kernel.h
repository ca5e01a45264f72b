// The loops over a vocabulary, in plain operations on lanes of a fixed number: compilers make
// vectors of them, and all instruction sets that fuse make the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace aegaeon::ops {

// Logits of which the highest is noted: who looks for high ones skips most blocks.
constexpr std::size_t kHighBlock = 64;
// Weights whose sum is noted: who looks for a height adds up one block.
constexpr std::size_t kSumBlock = 512;

inline std::size_t blocks_of(std::size_t count, std::size_t block) {
  return (count + block - 1) / block;
}

struct SamplingKernel {
  // highs[b] becomes the highest logit of block b; false where any logit is infinite or NaN.
  bool (*find_highs)(const float* logits, std::size_t count, float* highs);
  // weights[i] becomes exp((logits[i] - high) * coldness), at least e^-708; `high` is the highest
  // logit.
  void (*weigh)(const float* logits, std::size_t count, double high, double coldness,
                double* weights);
  // sums[b] becomes the sum of block b's weights that are at least `floor`.
  void (*sum_blocks)(const double* weights, std::size_t count, double floor, double* sums);
  // Appends to `found` the indices, ascending, of weights in [low, high]; returns how many.
  std::size_t (*find_between)(const double* weights, std::size_t count, double low, double high,
                              std::uint32_t* found);
};

SamplingKernel baseline_sampling();
SamplingKernel avx2_sampling();
SamplingKernel avx512_sampling();

}  // namespace aegaeon::ops

// The next token of each row on a device: the formula of ops/sampling.h, and its order of sums, so
// that tokens are the CPU's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/cuda/ops.h"
#include "ops/philox.h"
#include "ops/sampling.h"

namespace aegaeon::ops::cuda {

// A Draw as kernels take it, with its random number.
struct DeviceDraw {
  double temperature;
  double top_p;
  double min_p;
  double height;  // in [0, 1)
  std::uint64_t top_k;
};

inline DeviceDraw device_draw(const Draw& draw) {
  return {draw.temperature, draw.top_p, draw.min_p, uniform(draw.seed, draw.position), draw.top_k};
}

// Rows that are sampled side by side; further ones take turns.
constexpr std::size_t kRowsAtOnce = 32;

struct SampleTokensParams {
  const float* logits;  // [rows, vocab]
  std::size_t rows;
  std::size_t vocab;        // 1 .. 2^32 - 1
  const DeviceDraw* draws;  // [rows]
  std::int64_t* tokens;     // [rows]; -1 where a logit is infinite or NaN
  void* workspace;          // 16-byte aligned
};

std::size_t sample_workspace_bytes(std::size_t rows, std::size_t vocab);

void sample(Stream stream, const SampleTokensParams& params);

}  // namespace aegaeon::ops::cuda

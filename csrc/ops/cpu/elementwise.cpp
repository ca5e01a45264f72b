// rms_norm, rotate and silu_mul, in plain loops that compilers make vectors of.

#include <algorithm>
#include <cmath>

#include "ops/cpu/exp.h"
#include "ops/cpu/thread_pool.h"
#include "ops/ops.h"

namespace aegaeon::ops {
namespace {

constexpr std::size_t kLanes = 16;
// Floats that are worth waking another thread for.
constexpr std::size_t kClaimFloats = 16 << 10;

std::size_t rows_per_claim(std::size_t features) {
  return std::max<std::size_t>(1, kClaimFloats / std::max<std::size_t>(1, features));
}

// Element i goes to lane i % kLanes, then lanes are added in halves: one order for every row.
float sum_of_squares(const float* x, std::size_t count) {
  float lanes[kLanes] = {};
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane] * x[i + lane];
  }
  for (std::size_t lane = 0; i < count; ++i, ++lane) lanes[lane] += x[i] * x[i];
  for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

void norm_row(const RmsNormParams& params, std::size_t row) {
  const std::size_t features = params.features;
  const std::size_t from =
      params.chosen == nullptr ? row : static_cast<std::size_t>(params.chosen[row]);
  for (std::size_t head = 0; head < params.heads; ++head) {
    const float* const x = params.x.first + from * params.x.stride + head * features;
    float* const out = params.out + (row * params.heads + head) * features;
    const float mean = sum_of_squares(x, features) / static_cast<float>(features);
    const float root = std::sqrt(mean + params.eps);
    for (std::size_t i = 0; i < features; ++i) out[i] = x[i] / root * params.weight[i];
  }
}

void rotate_row(const RotateParams& params, std::size_t row) {
  const std::size_t half = params.head_dim / 2;
  const float* const cos = params.cos + row * params.head_dim;
  const float* const sin = params.sin + row * params.head_dim;
  for (std::size_t head = 0; head < params.heads; ++head) {
    const float* const x = params.x.first + row * params.x.stride + head * params.head_dim;
    float* const out = params.out + (row * params.heads + head) * params.head_dim;
    for (std::size_t i = 0; i < half; ++i) {
      out[i] = x[i] * cos[i] - x[i + half] * sin[i];
      out[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half];
    }
  }
}

void silu_row(const SiluMulParams& params, std::size_t row) {
  const float* const gate = params.gate.first + row * params.gate.stride;
  const float* const up = params.up.first + row * params.up.stride;
  float* const out = params.out + row * params.features;
  for (std::size_t i = 0; i < params.features; ++i) {
    out[i] = gate[i] / (1.0F + exp_float(-gate[i])) * up[i];
  }
}

// Calls row(params, r) for every row.
template <typename Params, typename Row>
void each_row(ThreadPool& pool, const Params& params, std::size_t features, const Row& row) {
  pool.for_ranges(params.rows, rows_per_claim(features), [&](std::size_t first, std::size_t last) {
    for (std::size_t r = first; r < last; ++r) row(params, r);
  });
}

}  // namespace

void rms_norm(ThreadPool& pool, const RmsNormParams& params) {
  each_row(pool, params, params.heads * params.features, norm_row);
}

void rotate(ThreadPool& pool, const RotateParams& params) {
  each_row(pool, params, params.heads * params.head_dim, rotate_row);
}

void silu_mul(ThreadPool& pool, const SiluMulParams& params) {
  each_row(pool, params, params.features, silu_row);
}

}  // namespace aegaeon::ops

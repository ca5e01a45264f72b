// rms_norm, and with it what is added to a row before: few features are one warp's, many a block's.

#include "ops/cuda/ops.h"
#include "ops/cuda/warp.h"

namespace aegaeon::ops::cuda {
namespace {

constexpr std::size_t kWarpFeatures = 512;
constexpr int kNormThreads = 256, kNormWarps = kNormThreads / 32;

struct NormMemory {
  float sums[kNormWarps];
};

// Adds the residual to a head's features, if there is one, and returns where the sums are.
__device__ __forceinline__ const float* add_residual(const AddRmsNormParams& params,
                                                     std::size_t row, std::size_t head,
                                                     std::size_t first, std::size_t step) {
  const RmsNormParams& norm = params.norm;
  const std::size_t from =
      norm.chosen == nullptr ? row : static_cast<std::size_t>(norm.chosen[row]);
  const float* const x = norm.x.first + from * norm.x.stride + head * norm.features;
  if (params.sum == nullptr) return x;
  const std::size_t home = (row * norm.heads + head) * norm.features;
  for (std::size_t i = first; i < norm.features; i += step) {
    params.sum[home + i] = x[i] + params.residual[home + i];
  }
  return params.sum + home;
}

// A thread sees only what it has written itself: element i is always the same thread's.
template <bool is_of_block>
__global__ void __launch_bounds__(kNormThreads) norm_rows(const AddRmsNormParams params) {
  const RmsNormParams& norm = params.norm;
  const std::size_t warp = threadIdx.x / 32;
  const std::size_t item = is_of_block ? blockIdx.x : blockIdx.x * kNormWarps + warp;
  if (item >= norm.rows * norm.heads) return;
  const std::size_t first = is_of_block ? threadIdx.x : threadIdx.x % 32;
  constexpr std::size_t kStep = is_of_block ? kNormThreads : 32;
  const float* const x = add_residual(params, item / norm.heads, item % norm.heads, first, kStep);
  float sum = 0.0F;
  for (std::size_t i = first; i < norm.features; i += kStep) sum = __fmaf_rn(x[i], x[i], sum);
  if constexpr (is_of_block) {
    sum = sum_of_block(sum, block_memory<NormMemory>().sums);
  } else {
    sum = sum_of_warp(sum);
  }
  const float root = sqrtf(sum / static_cast<float>(norm.features) + norm.eps);
  const std::size_t home = item * norm.features;
  auto* const rounded = static_cast<Bf16*>(params.rounded);
  for (std::size_t i = first; i < norm.features; i += kStep) {
    const float normed = x[i] / root * norm.weight[i];
    if (rounded == nullptr) {
      norm.out[home + i] = normed;
    } else {
      narrow(normed, rounded[home + i]);
    }
  }
}

}  // namespace

void add_rms_norm(Stream stream, const AddRmsNormParams& params) {
  const std::size_t items = params.norm.rows * params.norm.heads;
  if (items == 0) return;
  if (params.norm.features > kWarpFeatures) {
    launch(&norm_rows<true>,
           {{static_cast<unsigned>(items), 1, 1}, kNormThreads, sizeof(NormMemory)}, stream,
           params);
  } else {
    const std::size_t blocks = (items + kNormWarps - 1) / kNormWarps;
    launch(&norm_rows<false>, {{static_cast<unsigned>(blocks), 1, 1}, kNormThreads, 0}, stream,
           params);
  }
}

void rms_norm(Stream stream, const RmsNormParams& params) {
  add_rms_norm(stream, {params, nullptr, nullptr});
}

}  // namespace aegaeon::ops::cuda

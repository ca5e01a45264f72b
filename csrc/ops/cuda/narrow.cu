// narrow_rows: a warp for each row, which looks for the row's largest element first where that has
// to fit f16.

#include <stdexcept>

#include "ops/cuda/compiler.h"
#include "ops/cuda/ops.h"
#include "ops/cuda/warp.h"

namespace aegaeon::ops::cuda {
namespace {

constexpr std::size_t kNarrowThreads = 256, kNarrowWarps = kNarrowThreads / 32;
constexpr float kMostF16 = 65504.0F;

// The power of two that leaves the largest element in [2^14, 2^15), of a row that has none but
// numbers and one beyond f16.
__device__ __forceinline__ unsigned scale_exponent(float largest) {
  if (!(largest > kMostF16) || largest - largest != 0.0F) return 0;
  return (bits_of_float(largest) >> 23 & 0xFFU) - 127 - 14;
}

__device__ __forceinline__ float power_of_two(unsigned biased) {
  return float_of_bits(biased << 23);
}

// 0 where the row has a NaN: fmaxf leaves it out, and what is scaled stays one.
__device__ __forceinline__ float largest_of_row(const float* x, std::size_t features,
                                                std::size_t lane) {
  float largest = 0.0F;
  for (std::size_t i = lane; i < features; i += 32) largest = fmaxf(largest, fabsf(x[i]));
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  }
  return largest;
}

template <typename T, bool is_scaled>
__global__ void __launch_bounds__(kNarrowThreads) narrow_by_warps(const NarrowParams params) {
  const std::size_t row = blockIdx.x * kNarrowWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= params.rows) return;
  const float* const x = params.x.first + row * params.x.stride;
  T* const out = static_cast<T*>(params.out) + row * params.features;
  float inverse = 1.0F;
  if constexpr (is_scaled) {
    const unsigned exponent = scale_exponent(largest_of_row(x, params.features, lane));
    inverse = power_of_two(127 - exponent);
    if (lane == 0) params.scales[row] = power_of_two(127 + exponent);
  }
  for (std::size_t i = lane; i < params.features; i += 32) narrow(x[i] * inverse, out[i]);
}

template <typename T, bool is_scaled>
void launch_narrow(Stream stream, const NarrowParams& params) {
  if (params.rows == 0) return;
  const auto blocks = static_cast<unsigned>((params.rows + kNarrowWarps - 1) / kNarrowWarps);
  launch(&narrow_by_warps<T, is_scaled>, {{blocks, 1, 1}, kNarrowThreads, 0}, stream, params);
}

}  // namespace

void narrow_rows(Stream stream, const NarrowParams& params) {
  switch (params.type) {
    case WeightType::bf16:
      return launch_narrow<Bf16, false>(stream, params);
    case WeightType::f16:
      return launch_narrow<F16, true>(stream, params);
    default:
      throw std::invalid_argument("rows are narrowed to bf16 or f16");
  }
}

}  // namespace aegaeon::ops::cuda

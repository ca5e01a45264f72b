// Sums over a warp and over a block, each in one order.
#pragma once

#include "ops/cuda/compiler.h"

namespace aegaeon::ops::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFU;

// The same bits in all lanes: halves are added, and a + b is b + a.
template <typename T>
__device__ __forceinline__ T sum_of_warp(T value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// Warps one after another. `room` has an element for each; all threads must come, and again before
// `room` is written anew.
template <typename T>
__device__ __forceinline__ T sum_of_block(T value, T* room) {
  const int warps = static_cast<int>(blockDim.x) / 32, thread = static_cast<int>(threadIdx.x);
  value = sum_of_warp(value);
  if (thread % 32 == 0) room[thread / 32] = value;
  __syncthreads();
  T sum = room[0];
  for (int warp = 1; warp < warps; ++warp) sum += room[warp];
  return sum;
}

}  // namespace aegaeon::ops::cuda

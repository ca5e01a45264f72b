// What a block of threads does over a row of a vocabulary: folds, bins and numbers in order.
#pragma once

#include "ops/cuda/warp.h"

namespace aegaeon::ops::cuda {

constexpr int kSampleThreads = 512, kSampleWarps = kSampleThreads / 32;
constexpr int kBins = 2048, kBinsEach = kBins / kSampleThreads;
constexpr unsigned kNoBin = kBins;
// So few are sorted.
constexpr unsigned kSorted = 64;
// Weights whose sum is noted, as on the CPU.
constexpr std::size_t kSumBlock = 512;

struct SampleMemory {
  unsigned long long sums[kBins];  // of weights, in ticks
  unsigned counts[kBins];
  double partial[kSampleThreads];
  double sorted_weights[kSorted];
  unsigned sorted_ids[kSorted];
  double found_weights[kSorted];
  unsigned found_ids[kSorted];
  unsigned found;
  unsigned bin;
  double above;
  double room[kSampleWarps];
  unsigned warp_counts[kSampleWarps];
  std::size_t answer;
};

__device__ __forceinline__ std::size_t thread_of_row() { return threadIdx.x; }

// Folds what all threads have; `fold` must not care for order.
template <typename Fold>
__device__ __forceinline__ double fold_block(SampleMemory& memory, double value, const Fold& fold) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = fold(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  if (threadIdx.x % 32 == 0) memory.room[threadIdx.x / 32] = value;
  __syncthreads();
  value = memory.room[0];
  for (int warp = 1; warp < kSampleWarps; ++warp) value = fold(value, memory.room[warp]);
  __syncthreads();
  return value;
}

// Calls act(rank, at) for every `at` below count that `is` holds for: rank counts them in order.
// Returns how many there are.
template <typename Is, typename Act>
__device__ std::size_t number_in_order(SampleMemory& memory, std::size_t count, const Is& is,
                                       const Act& act) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  std::size_t seen = 0;
  for (std::size_t first = 0; first < count; first += kSampleThreads) {
    const std::size_t at = first + threadIdx.x;
    const bool is_hit = at < count && is(at);
    const unsigned votes = __ballot_sync(kAllLanes, is_hit ? 1 : 0);
    if (lane == 0) memory.warp_counts[warp] = static_cast<unsigned>(__popc(votes));
    __syncthreads();
    std::size_t rank = seen;
    for (unsigned other = 0; other < kSampleWarps; ++other) {
      if (other < warp) rank += memory.warp_counts[other];
      seen += memory.warp_counts[other];
    }
    const unsigned before = votes & ((1U << lane) - 1U);
    if (is_hit) act(rank + static_cast<std::size_t>(__popc(before)), at);
    __syncthreads();
  }
  return seen;
}

__device__ __forceinline__ void clear_bins(SampleMemory& memory) {
  for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kSampleThreads) {
    memory.sums[bin] = 0;
    memory.counts[bin] = 0;
  }
  __syncthreads();
}

// Finds the first bin at which the sum of values reaches `wanted`, and makes `above` the sum of
// those before it; kNoBin where none does. The same for all threads.
template <typename Value>
__device__ __forceinline__ unsigned find_bin(SampleMemory& memory, double wanted, double& above,
                                             const Value& value) {
  const unsigned thread = threadIdx.x, own = thread * kBinsEach;
  double sum = 0;
  for (unsigned i = 0; i < kBinsEach; ++i) sum += value(own + i);
  memory.partial[thread] = sum;
  __syncthreads();
  if (thread == 0) {
    unsigned group = 0;
    while (group < kSampleThreads && above + memory.partial[group] < wanted) {
      above += memory.partial[group++];
    }
    unsigned bin = group * kBinsEach;
    for (; bin < kBins; ++bin) {
      const double added = value(bin);
      if (added > 0 && above + added >= wanted) break;
      above += added;
    }
    memory.bin = bin;
    memory.above = above;
  }
  __syncthreads();
  above = memory.above;
  const unsigned bin = memory.bin;
  __syncthreads();
  return bin;
}

}  // namespace aegaeon::ops::cuda

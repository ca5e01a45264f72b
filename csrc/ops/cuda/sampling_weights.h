// Weights of logits, and which of them are kept: what csrc/ops/cpu does, in steps of a block.
#pragma once

#include "ops/cuda/sampling_block.h"

namespace aegaeon::ops::cuda {

// e^x for x in [-708, 0], to the bit as csrc/ops/cpu/sampling_loops.h has it.
__device__ __forceinline__ double exp_double(double x) {
  constexpr double kRound = 0x1.8p52;  // what is added is rounded to an integer
  const double shifted = __fma_rn(x, 1.4426950408889634, kRound), n = shifted - kRound;
  const double r = __fma_rn(n, -1.42860682030941723212e-6, __fma_rn(n, -6.93145751953125e-1, x));
  double q = 0x1.af38d6336c037p-26;
  q = __fma_rn(q, r, 0x1.2891a98de7fcbp-22);
  q = __fma_rn(q, r, 0x1.71de0d9baab4ap-19);
  q = __fma_rn(q, r, 0x1.a019b8eebc08ap-16);
  q = __fma_rn(q, r, 0x1.a01a01a7c8efbp-13);
  q = __fma_rn(q, r, 0x1.6c16c17893af7p-10);
  q = __fma_rn(q, r, 0x1.11111111109adp-7);
  q = __fma_rn(q, r, 0x1.5555555553d4fp-5);
  q = __fma_rn(q, r, 0x1.5555555555556p-3);
  q = __fma_rn(q, r, 0x1.0000000000001p-1);
  const double p = __fma_rn(q * r, r, r) + 1.0;
  return p * double_of((bits_of_double(shifted) - bits_of_double(kRound) + 1023U) << 52);
}

// Of weights of at least `floor`, all but those equal to `least` whose ids come after `last`.
struct Kept {
  double floor = 0;
  double least = -1;
  std::size_t last = 0;

  __device__ __forceinline__ bool has(double weight, std::size_t at) const {
    return weight >= floor && !(weight == least && at > last);
  }
};

// Sums the weights that are kept in blocks of 512, each in the order of the CPU's eight lanes, and
// returns the sum of the blocks in theirs.
__device__ double sum_blocks(SampleMemory& memory, const double* weights, std::size_t count,
                             const Kept& kept, double* sums) {
  constexpr std::size_t kLanes = 8, kAtOnce = kSampleThreads / kLanes;
  const std::size_t lane = threadIdx.x % kLanes, blocks = (count + kSumBlock - 1) / kSumBlock;
  const auto value = [&](std::size_t i) { return kept.has(weights[i], i) ? weights[i] : 0.0; };
  for (std::size_t first_block = 0; first_block < blocks; first_block += kAtOnce) {
    const std::size_t block = first_block + threadIdx.x / kLanes;
    const std::size_t end = min(count, (block + 1) * kSumBlock);
    std::size_t i = block * kSumBlock;
    double sum = 0;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      const std::size_t at = i + lane;
      sum += (value(at) + value(at + kLanes)) + (value(at + 2 * kLanes) + value(at + 3 * kLanes));
    }
    for (i += lane; i < end; i += kLanes) sum += value(i);
#pragma unroll
    for (int half = 4; half > 0; half /= 2) sum += __shfl_xor_sync(kAllLanes, sum, half);
    if (lane == 0 && block < blocks) sums[block] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (std::size_t block = 0; block < blocks; ++block) total += sums[block];
    memory.above = total;
  }
  __syncthreads();
  const double total = memory.above;
  __syncthreads();
  return total;
}

// The fewest, heaviest weights whose sum reaches `wanted`: they are counted by ranges of their
// bits, and the range where the sum reaches it is looked at closer, until it is short enough to
// sort. Sums of a range are integers, so that no order shows in them.
struct Nucleus {
  SampleMemory& memory;
  const double* weights;
  std::size_t count;
  double wanted;
  double above = 0;
  std::uint64_t most = 0x3FF0000000000000U;  // the bits of 1, the heaviest weight
  std::uint64_t least = 0;

  __device__ __forceinline__ bool is_in_range(std::size_t at) const {
    const std::uint64_t bits = bits_of_double(weights[at]);
    return bits >= least && bits <= most;
  }

  // Ticks of a weight of one: so many that no sum of `count` weights of the bin overflows, each
  // below the power of two that its heaviest is below.
  __device__ __forceinline__ double ticks_of_one(unsigned bin, unsigned room, bool is_first) const {
    constexpr std::uint64_t kMost = 900;  // what is lighter than this comes to nothing
    const std::uint64_t halvings = is_first ? bin / 64 : min(1023 - (most >> 52), kMost);
    return double_of((1023U + room + halvings) << 52);
  }

  __device__ unsigned look(unsigned shift, bool is_first);
  __device__ Kept sort() const;
  __device__ Kept cut_ties(unsigned ties) const;
  __device__ Kept cut();
};

__device__ __forceinline__ unsigned Nucleus::look(unsigned shift, bool is_first) {
  unsigned room = 61;
  while (count >> (62 - room) != 0) --room;
  clear_bins(memory);
  for (std::size_t at = thread_of_row(); at < count; at += kSampleThreads) {
    if (!is_in_range(at)) continue;
    const std::uint64_t distance = (most - bits_of_double(weights[at])) >> shift;
    const auto bin = static_cast<unsigned>(min(distance, std::uint64_t{kBins - 1}));
    const double ticks = weights[at] * ticks_of_one(bin, room, is_first);
    atomicAdd(&memory.sums[bin], static_cast<unsigned long long>(ticks + 0.5));
    atomicAdd(&memory.counts[bin], 1U);
  }
  __syncthreads();
  return find_bin(memory, wanted, above, [&](unsigned bin) {
    return static_cast<double>(memory.sums[bin]) / ticks_of_one(bin, room, is_first);
  });
}

// Sorts what is in range, heaviest and then lowest ids first, and takes of it until the sum reaches
// what is wanted.
__device__ __forceinline__ Kept Nucleus::sort() const {
  if (threadIdx.x == 0) memory.found = 0;
  __syncthreads();
  for (std::size_t at = thread_of_row(); at < count; at += kSampleThreads) {
    if (!is_in_range(at)) continue;
    const unsigned slot = atomicAdd(&memory.found, 1U);
    memory.found_weights[slot] = weights[at];
    memory.found_ids[slot] = static_cast<unsigned>(at);
  }
  __syncthreads();
  const unsigned length = memory.found;
  if (threadIdx.x < length) {
    const double weight = memory.found_weights[threadIdx.x];
    const unsigned id = memory.found_ids[threadIdx.x];
    unsigned rank = 0;
    for (unsigned other = 0; other < length; ++other) {
      const double others = memory.found_weights[other];
      rank += others > weight || (others == weight && memory.found_ids[other] < id) ? 1 : 0;
    }
    memory.sorted_weights[rank] = weight;
    memory.sorted_ids[rank] = id;
  }
  __syncthreads();
  unsigned last = 0;
  double sum = above + memory.sorted_weights[0];
  while (sum < wanted && last + 1 < length) sum += memory.sorted_weights[++last];
  const double weight = memory.sorted_weights[last];
  return {weight, weight, memory.sorted_ids[last]};
}

// All in range weigh the same: takes them by id.
__device__ __forceinline__ Kept Nucleus::cut_ties(unsigned ties) const {
  const double weight = double_of(most);
  std::size_t taken = 1;
  double sum = above + weight;
  while (sum < wanted && taken < ties) {
    sum += weight;
    ++taken;
  }
  number_in_order(
      memory, count, [&](std::size_t at) { return weights[at] == weight; },
      [&](std::size_t rank, std::size_t at) {
        if (rank + 1 == taken) memory.answer = at;
      });
  const std::size_t last = memory.answer;
  __syncthreads();
  return {weight, weight, last};
}

__device__ __forceinline__ Kept Nucleus::cut() {
  // 64 bins to a halving of the weight; the last one has all that is lighter than 2^-32.
  unsigned shift = 46;
  for (bool is_first = true;; is_first = false) {
    const unsigned bin = look(shift, is_first);
    // Added up in another order, they may fall short by a rounding: then all of them are needed.
    if (bin == kNoBin) return {is_first ? 0.0 : double_of(least), -1.0, 0};
    const unsigned inside = memory.counts[bin];
    __syncthreads();
    most -= static_cast<std::uint64_t>(bin) << shift;
    const std::uint64_t width = (std::uint64_t{1} << shift) - 1;
    if (bin < kBins - 1 && most - least > width) least = most - width;
    if (inside <= kSorted) return sort();
    if (least == most) return cut_ties(inside);
    shift = 0;
    while ((most - least) >> shift >= kBins) ++shift;
  }
}

}  // namespace aegaeon::ops::cuda

// sample: a block of threads for each row, as many rows side by side as the workspace has room for.

#include "ops/cuda/sampling.h"
#include "ops/cuda/sampling_weights.h"

namespace aegaeon::ops::cuda {
namespace {

// A row's part of the workspace. Weights, ids and logits are of those that top_k leaves.
struct RowSpace {
  double* weights;  // [vocab]
  double* sums;     // [blocks of 512]
  float* logits;    // [vocab]
  unsigned* ids;    // [vocab]
};

__host__ __device__ inline std::size_t row_bytes(std::size_t vocab) {
  const std::size_t blocks = (vocab + kSumBlock - 1) / kSumBlock;
  return (vocab * 16 + blocks * 8 + 15) / 16 * 16;
}

__device__ RowSpace space_of(void* workspace, std::size_t number, std::size_t vocab) {
  auto* const weights =
      reinterpret_cast<double*>(static_cast<char*>(workspace) + number * row_bytes(vocab));
  double* const sums = weights + vocab;
  auto* const logits = reinterpret_cast<float*>(sums + (vocab + kSumBlock - 1) / kSumBlock);
  return {weights, sums, logits, reinterpret_cast<unsigned*>(logits + vocab)};
}

struct Row {
  SampleMemory& memory;
  const float* logits;
  std::size_t count;
  RowSpace space;
  double high = 0;

  __device__ bool read();
  __device__ std::size_t greedy() const;
  __device__ std::size_t draw(const DeviceDraw& draw);

 private:
  __device__ float kth_highest(std::uint64_t k) const;
  __device__ void choose_top(std::uint64_t top_k, double temperature);
  __device__ void weigh(double temperature) const;
  __device__ std::size_t find_height(double wanted, const Kept& kept) const;
};

// Finds the highest logit; false where one is infinite or NaN.
__device__ bool Row::read() {
  double highest = -INFINITY, oddness = 0;
  for (std::size_t i = thread_of_row(); i < count; i += kSampleThreads) {
    const double logit = static_cast<double>(logits[i]);
    highest = fmax(highest, logit);
    if (!(logit - logit == 0.0)) oddness = 1;
  }
  const auto higher = [](double a, double b) { return fmax(a, b); };
  high = fold_block(memory, highest, higher);
  return fold_block(memory, oddness, higher) == 0.0;
}

__device__ std::size_t Row::greedy() const {
  double lowest = INFINITY;  // ids are exact
  for (std::size_t i = thread_of_row(); i < count; i += kSampleThreads) {
    if (static_cast<double>(logits[i]) == high) lowest = fmin(lowest, static_cast<double>(i));
  }
  lowest = fold_block(memory, lowest, [](double a, double b) { return fmin(a, b); });
  return static_cast<std::size_t>(lowest);
}

// By the digits of its bits, the first of eleven, of numbers in the order of unsigned ones.
__device__ float Row::kth_highest(std::uint64_t k) const {
  const auto key_of = [](float logit) {
    const unsigned bits = bits_of_float(logit);
    return bits >> 31 != 0 ? ~bits : bits | 0x80000000U;
  };
  unsigned prefix = 0;
  auto left = static_cast<double>(k);
  for (unsigned digit = 0; digit < 3; ++digit) {
    const unsigned width = digit == 2 ? 10 : 11, mask = (1U << width) - 1U;
    const unsigned shift = digit == 0 ? 21 : digit == 1 ? 10 : 0;
    clear_bins(memory);
    for (std::size_t i = thread_of_row(); i < count; i += kSampleThreads) {
      const unsigned key = key_of(logits[i]);
      const bool is_candidate = digit == 0 || key >> (shift + width) == prefix;
      if (is_candidate) atomicAdd(&memory.counts[mask - (key >> shift & mask)], 1U);
    }
    __syncthreads();
    double above = 0;
    const unsigned bin = find_bin(
        memory, left, above, [&](unsigned at) { return static_cast<double>(memory.counts[at]); });
    left -= above;
    prefix = prefix << width | (mask - bin);
  }
  return float_of_bits(prefix >> 31 != 0 ? prefix & 0x7FFFFFFFU : ~prefix);
}

// Narrows the row to the k highest logits and their ties, by id. They are compared as weighed: what
// rounding makes equal is a tie.
__device__ void Row::choose_top(std::uint64_t top_k, double temperature) {
  const auto scaled = [&](float logit) {
    return (static_cast<double>(logit) - high) / temperature;
  };
  const double least = scaled(kth_highest(top_k));
  count = number_in_order(
      memory, count, [&](std::size_t at) { return scaled(logits[at]) >= least; },
      [&](std::size_t rank, std::size_t at) {
        space.ids[rank] = static_cast<unsigned>(at);
        space.logits[rank] = logits[at];
      });
  logits = space.logits;
}

__device__ void Row::weigh(double temperature) const {
  const double coldness = fmin(1.0 / temperature, 1e300);
  for (std::size_t i = thread_of_row(); i < count; i += kSampleThreads) {
    const double scaled = (static_cast<double>(logits[i]) - high) * coldness;
    space.weights[i] = exp_double(scaled > -708.0 ? scaled : -708.0);
  }
  __syncthreads();
}

// The first index at which the sum of the weights kept, whose blocks' sums are there, exceeds
// `wanted`: one thread's work, a block of weights is brought near for it.
__device__ std::size_t Row::find_height(double wanted, const Kept& kept) const {
  const std::size_t blocks = (count + kSumBlock - 1) / kSumBlock;
  double height = 0;
  std::size_t block = 0;
  while (block + 1 < blocks && height + space.sums[block] <= wanted) {
    height += space.sums[block++];
  }
  const std::size_t first = block * kSumBlock, end = min(count, first + kSumBlock);
  static_assert(kSumBlock == kSampleThreads);
  const std::size_t own = first + threadIdx.x;
  const double weight = own < end ? space.weights[own] : 0.0;
  memory.partial[threadIdx.x] = own < end && kept.has(weight, own) ? weight : -1.0;
  __syncthreads();
  if (threadIdx.x == 0) {
    std::size_t at = first;
    for (; at < end; ++at) {
      const double added = memory.partial[at - first];
      if (added < 0) continue;
      height += added;
      if (height > wanted) break;
    }
    // One by one they come to less than together, by a rounding: it is the last of them.
    if (at == end) {
      --at;
      while (at > 0 && !kept.has(space.weights[at], at)) --at;
    }
    memory.answer = at;
  }
  __syncthreads();
  const std::size_t answer = memory.answer;
  __syncthreads();
  return answer;
}

__device__ std::size_t Row::draw(const DeviceDraw& draw) {
  const bool is_narrowed = draw.top_k > 0 && draw.top_k < count;
  if (is_narrowed) choose_top(draw.top_k, draw.temperature);
  weigh(draw.temperature);
  Kept kept;
  double total = sum_blocks(memory, space.weights, count, kept, space.sums);
  if (draw.top_p < 1.0) {
    kept = Nucleus{memory, space.weights, count, draw.top_p * total}.cut();
  }
  // The heaviest has weight 1.
  if (draw.min_p > 0) kept.floor = fmax(kept.floor, fmin(draw.min_p, 1.0));
  if (kept.floor > 0) total = sum_blocks(memory, space.weights, count, kept, space.sums);
  const std::size_t index = find_height(draw.height * total, kept);
  return is_narrowed ? space.ids[index] : index;
}

// Blocks: rows in turns.
__global__ void __launch_bounds__(kSampleThreads, 1) sample_rows(const SampleTokensParams params) {
  auto& memory = block_memory<SampleMemory>();
  for (std::size_t at = blockIdx.x; at < params.rows; at += gridDim.x) {
    Row row{memory, params.logits + at * params.vocab, params.vocab,
            space_of(params.workspace, blockIdx.x, params.vocab)};
    const DeviceDraw& draw = params.draws[at];
    std::int64_t token = -1;
    if (row.read()) {
      token = static_cast<std::int64_t>(draw.temperature > 0 ? row.draw(draw) : row.greedy());
    }
    if (threadIdx.x == 0) params.tokens[at] = token;
  }
}

}  // namespace

std::size_t sample_workspace_bytes(std::size_t rows, std::size_t vocab) {
  return (rows < kRowsAtOnce ? rows : kRowsAtOnce) * row_bytes(vocab);
}

void sample(Stream stream, const SampleTokensParams& params) {
  if (params.rows == 0) return;
  const auto blocks = static_cast<unsigned>(params.rows < kRowsAtOnce ? params.rows : kRowsAtOnce);
  launch(&sample_rows, {{blocks, 1, 1}, kSampleThreads, sizeof(SampleMemory)}, stream, params);
}

}  // namespace aegaeon::ops::cuda

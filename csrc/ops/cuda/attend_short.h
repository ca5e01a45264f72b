// Attention of few queries to a long context, as in decoding: a block of threads for each split of
// each tile and KV head. Its four warps share the split step by step: each scores a quarter of the
// tokens, then sums up a quarter of the elements of the values. A second kernel joins the splits.
#pragma once

#include "ops/cuda/attend_call.h"
#include "ops/cuda/attend_softmax.h"

namespace aegaeon::ops::cuda {

template <typename T, int head_dim>
struct ShortMemory {
  using L = Layout<T, head_dim>;
  T stages[L::kStages][2][L::kStep * L::kRow];  // keys, values
  T queries[kTileRows * L::kRow];
  T weights[kTileRows * L::kWeightRow];
  float highs[kWarps][kTileRows];
  float sums[kWarps][kTileRows][4];  // of weights, for each thread that has a part of a row
  unsigned char poisoned[L::kStep];
};

// Where splits wait to be joined, [KV head][query of short tiles][split].
struct Partials {
  float* sums;
  Softmax* softmax;

  __device__ __forceinline__ Partials(const TileOfHead& at, int head_dim) {
    const AttendCall& call = at.call;
    const std::size_t all = call.kv.kv_heads * call.short_queries * call.splits;
    const std::size_t query = static_cast<std::size_t>(at.kv_head) * call.short_queries +
                              static_cast<std::size_t>(at.tile.first_partial);
    const std::size_t first = query * call.splits, width = static_cast<std::size_t>(head_dim);
    sums = call.workspace + first * width;
    softmax = reinterpret_cast<Softmax*>(call.workspace + all * width) + first;
  }
};

// A split in the making.
template <typename T, int head_dim>
struct ShortSplit {
  using L = Layout<T, head_dim>;
  static constexpr int kQuarter = L::kStep / kWarps, kColumns = kQuarter / kTileColumns;
  static constexpr int kTiles = head_dim / kTileColumns / kWarps;

  ShortMemory<T, head_dim>& memory;
  int seen[2];  // by the thread's rows
  float scale;
  Progress progress;
  float sums[kTiles][4];

  // Takes the tokens from `first` on, whose keys and values have come. Ends with all threads done.
  __device__ __forceinline__ void take(const T* keys, const T* values, int first, bool has_poison) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_of_warp();
    const int group = lane / 4, quarter = warp * kQuarter;
    float scores[kColumns][4] = {};
    score<L, head_dim>(memory.queries, keys + quarter * L::kRow, scores);
    hide(scores, {first + quarter, {seen[0], seen[1]}}, scale,
         has_poison ? memory.poisoned + quarter : nullptr);
    TwoRows highs = find_highs(scores);
    if (lane % 4 == 0) memory.highs[warp][group] = highs.of[0];
    if (lane % 4 == 1) memory.highs[warp][group + 8] = highs.of[1];
    __syncthreads();
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int other = 0; other < kWarps; ++other) {
        highs.of[row] = fmaxf(highs.of[row], memory.highs[other][group + 8 * row]);
      }
    }
    const TwoRows factors = progress.raise(highs);
    const TwoRows own = weigh<L, kColumns>(scores, progress.highs, memory.weights + quarter);
    memory.sums[warp][group][lane % 4] = own.of[0];
    memory.sums[warp][group + 8][lane % 4] = own.of[1];
    __syncthreads();
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float quarters[kWarps];
#pragma unroll
      for (int other = 0; other < kWarps; ++other) {
        quarters[other] = memory.sums[other][group + 8 * row][lane % 4];
      }
      progress.add(row, factors.of[row], quarters);
    }
    scale_sums(sums, factors);
    add_values<L>(memory.weights, values + warp * (head_dim / kWarps), sums);
    __syncthreads();
  }
};

// Writes a split's two rows of the thread: as results where it is the only one, else to wait.
template <typename T, int head_dim>
__device__ __forceinline__ void write_split(const TileOfHead& at, int split, bool is_only,
                                            const ShortSplit<T, head_dim>& made) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_of_warp();
  const Partials partials(at, head_dim);
  const std::size_t splits = at.call.splits;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const Softmax softmax = made.progress.softmax(row);
    const int query = lane / 4 + 8 * row;
    if (at.seen(query) == 0) continue;
    const std::size_t partial =
        static_cast<std::size_t>(query) * splits + static_cast<std::size_t>(split);
    float* const home =
        (is_only ? at.call.out + at.home(query, head_dim) : partials.sums + partial * head_dim) +
        warp * (head_dim / kWarps) + lane % 4 * 2;
    const float factor = is_only ? 1.0F / softmax.total : 1.0F;
#pragma unroll
    for (int n = 0; n < ShortSplit<T, head_dim>::kTiles; ++n) {
      const Pack<float, 2> both = {
          {made.sums[n][2 * row] * factor, made.sums[n][2 * row + 1] * factor}};
      *reinterpret_cast<Pack<float, 2>*>(home + kTileColumns * n) = both;
    }
    if (!is_only && warp == 0 && lane % 4 == 0) partials.softmax[partial] = softmax;
  }
}

// Blocks: [tile][KV head][split].
template <typename T, int head_dim>
__global__ void __launch_bounds__(kThreads, 4) attend_short(const AttendCall call) {
  using L = Layout<T, head_dim>;
  const AttendTile tile = call.short_tiles[blockIdx.x];
  if (tile.rows == 0) return;
  const TileOfHead at{call, tile, static_cast<int>(blockIdx.y)};
  constexpr int kSplit = static_cast<int>(kSplitTokens);
  const int seen = at.seen_by_all(kTileRows), split = static_cast<int>(blockIdx.z);
  const int first = split * kSplit, last = min(seen, first + kSplit);
  if (first >= seen) return;
  auto& memory = block_memory<ShortMemory<T, head_dim>>();
  const auto fetch = [&](int step) {
    auto& stage = memory.stages[step / L::kStep % L::kStages];
    if (step < last) fetch_step<T, head_dim>(at, step, stage[0], stage[1]);
    commit_copies();
  };
  load_queries<T, head_dim>(at, kTileRows, memory.queries);
  const int group = lane_of_warp() / 4;
  ShortSplit<T, head_dim> made{memory, {at.seen(group), at.seen(group + 8)}, call.scale, {}, {}};
  if (L::kStages > 1) fetch(first);
  for (int step = first; step < last; step += L::kStep) {
    fetch(L::kStages > 1 ? step + L::kStep : step);
    wait_copies<L::kStages - 1>();
    __syncthreads();
    auto& stage = memory.stages[step / L::kStep % L::kStages];
    const int common = at.seen(0);
    const bool has_poison = common < seen && common < step + L::kStep &&
                            hide_poison<T, head_dim>(stage[1], common - step, memory.poisoned);
    made.take(stage[0], stage[1], step, has_poison);
  }
  write_split(at, split, seen <= kSplit, made);
}

// Joins the splits of a tile's queries, each element by itself, in the order of the splits. Blocks:
// [tile][KV head].
template <int head_dim>
__global__ void __launch_bounds__(kThreads) join_splits(const AttendCall call) {
  const AttendTile tile = call.short_tiles[blockIdx.x];
  if (tile.rows == 0) return;
  const TileOfHead at{call, tile, static_cast<int>(blockIdx.y)};
  constexpr int kSplit = static_cast<int>(kSplitTokens);
  if (at.seen_by_all(kTileRows) <= kSplit) return;
  const Partials partials(at, head_dim);
  const std::size_t splits = call.splits;
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * head_dim; i += kThreads) {
    const int query = i / head_dim, element = i % head_dim, seen = at.seen(query);
    if (seen == 0) continue;
    const std::size_t first = static_cast<std::size_t>(query) * splits;
    Softmax all = partials.softmax[first];
    float sum = partials.sums[first * head_dim + static_cast<std::size_t>(element)];
    for (int split = 1; split * kSplit < seen; ++split) {
      const std::size_t from = first + static_cast<std::size_t>(split);
      const Join join = join_split(all, partials.softmax[from]);
      sum = join.of(sum, partials.sums[from * head_dim + static_cast<std::size_t>(element)]);
    }
    call.out[at.home(query, head_dim) + static_cast<std::size_t>(element)] =
        sum * (1.0F / all.total);
  }
}

}  // namespace aegaeon::ops::cuda

// Attention of many queries, as in prefilling: a block of threads for each tile of 64 queries and
// KV head. Each of its four warps has 16 of the queries and takes all tokens; what is copied for
// one serves all. Splits are joined as they end, in the results themselves: a thread's own
// elements, which stay in the second cache meanwhile.
#pragma once

#include "ops/cuda/attend_call.h"
#include "ops/cuda/attend_softmax.h"

namespace aegaeon::ops::cuda {

// Warps that share queries.
template <int head_dim>
constexpr int kSharing = head_dim > 128 ? 2 : 1;

template <typename T, int head_dim>
struct LongMemory {
  using L = Layout<T, head_dim>;
  T stages[L::kStages][2][L::kStep * L::kRow];  // keys, values
  T queries[kWarps * kTileRows * L::kRow];
  T weights[kSharing<head_dim> * kWarps][kTileRows * L::kWeightRow];
  unsigned char poisoned[L::kStep];
};

// The 16 queries of a warp, from `first_query` of the tile on, and the elements of values that it
// sums up for them.
template <typename T, int head_dim>
struct LongRows {
  using L = Layout<T, head_dim>;
  static constexpr int kColumns = L::kStep / kTileColumns, kQuarter = kColumns / kWarps;
  static constexpr int kTiles = head_dim / kTileColumns / kSharing<head_dim>;

  const TileOfHead& at;
  int first_query;
  int first_element;
  const T* queries;
  T* weights;
  Softmax all[2];  // of the thread's two rows: all splits that have ended
  Progress progress;
  float sums[kTiles][4];

  __device__ __forceinline__ int query(int row) const {
    return first_query + lane_of_warp() / 4 + 8 * row;
  }

  // Takes the tokens from `first` on.
  __device__ __forceinline__ void take(const T* keys, const T* values, int first,
                                       const unsigned char* poisoned) {
    float scores[kColumns][4] = {};
    score<L, head_dim>(queries, keys, scores);
    hide(scores, {first, {at.seen(query(0)), at.seen(query(1))}}, at.call.scale, poisoned);
    const TwoRows factors = progress.raise(find_highs(scores));
    TwoRows quarters[kWarps];
#pragma unroll
    for (int quarter = 0; quarter < kWarps; ++quarter) {
      quarters[quarter] = weigh<L, kQuarter>(scores + quarter * kQuarter, progress.highs,
                                             weights + quarter * kQuarter * kTileColumns);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      progress.add(
          row, factors.of[row],
          {quarters[0].of[row], quarters[1].of[row], quarters[2].of[row], quarters[3].of[row]});
    }
    scale_sums(sums, factors);
    __syncwarp();
    add_values<L>(weights, values + first_element, sums);
    __syncwarp();
  }

  // Joins the split that ends, number `split`, to those before it, and begins the next.
  __device__ __forceinline__ void end_split(int split) {
    constexpr int kSplit = static_cast<int>(kSplitTokens);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const Softmax softmax = progress.softmax(row);
      const int seen = at.seen(query(row));
      if (seen <= split * kSplit) continue;
      const bool is_first = split == 0, is_last = seen <= (split + 1) * kSplit;
      Join join = {0.0F, 1.0F};
      if (is_first) {
        all[row] = softmax;
      } else {
        join = join_split(all[row], softmax);
      }
      float* const home =
          at.call.out + at.home(query(row), head_dim) + first_element + lane_of_warp() % 4 * 2;
      const float factor = is_last ? 1.0F / all[row].total : 1.0F;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        // Else all of them would be loaded first, into registers that are not there.
        keep_loads_behind();
        auto& both = *reinterpret_cast<Pack<float, 2>*>(home + kTileColumns * n);
        float first = sums[n][2 * row], second = sums[n][2 * row + 1];
        if (!is_first) {
          first = join.of(both.of[0], first);
          second = join.of(both.of[1], second);
        }
        both = {{first * factor, second * factor}};
      }
    }
    progress = Progress{};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] = 0.0F;
    }
  }
};

// Blocks: [tile][KV head].
template <typename T, int head_dim>
__global__ void __launch_bounds__(kSharing<head_dim>* kThreads) attend_long(const AttendCall call) {
  using L = Layout<T, head_dim>;
  const AttendTile tile = call.long_tiles[blockIdx.x];
  if (tile.rows == 0) return;
  const TileOfHead at{call, tile, static_cast<int>(blockIdx.y)};
  constexpr int kSplit = static_cast<int>(kSplitTokens), kQueries = kWarps * kTileRows;
  const int last = at.seen_by_all(kQueries), warp = static_cast<int>(threadIdx.x) / 32;
  auto& memory = block_memory<LongMemory<T, head_dim>>();
  const auto fetch = [&](int step) {
    auto& stage = memory.stages[step / L::kStep % L::kStages];
    if (step < last) fetch_step<T, head_dim>(at, step, stage[0], stage[1]);
    commit_copies();
  };
  load_queries<T, head_dim>(at, kQueries, memory.queries);
  const int part = warp % kWarps, first_element = warp / kWarps * (head_dim / kSharing<head_dim>);
  LongRows<T, head_dim> rows{at,
                             part * kTileRows,
                             first_element,
                             memory.queries + part * kTileRows * L::kRow,
                             memory.weights[warp],
                             {},
                             {},
                             {}};
  if (L::kStages > 1) fetch(0);
  for (int step = 0; step < last; step += L::kStep) {
    fetch(L::kStages > 1 ? step + L::kStep : step);
    wait_copies<L::kStages - 1>();
    __syncthreads();
    auto& stage = memory.stages[step / L::kStep % L::kStages];
    const int common = at.seen(0);
    const bool has_poison = common < last && common < step + L::kStep &&
                            hide_poison<T, head_dim>(stage[1], common - step, memory.poisoned);
    rows.take(stage[0], stage[1], step, has_poison ? memory.poisoned : nullptr);
    if ((step + L::kStep) % kSplit == 0 || step + L::kStep >= last) rows.end_split(step / kSplit);
    __syncthreads();
  }
}

}  // namespace aegaeon::ops::cuda

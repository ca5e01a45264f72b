// The softmax of a split, token step by token step, and how splits are joined (Milakov & Gimelshein
// 2018), in powers of two. Rows lie across a warp as attend_tile.h says: a thread has two.
#pragma once

#include <cfloat>
#include <cmath>

#include "ops/cuda/attend_tile.h"

namespace aegaeon::ops::cuda {

// The largest score of a query, and the sum of its weights, 2^(score - high).
struct Softmax {
  float high;
  float total;
};

struct TwoRows {
  float of[2];
};

// Finite: it is subtracted even where nothing is seen.
constexpr float kNothingSeen = -FLT_MAX;

// Whose tokens a thread's two rows see: those before `seen`, of a step that begins at `first`.
struct Sight {
  int first;
  int seen[2];
};

// Scales scores, and hides those of tokens that a row must not see, whatever they are. A token with
// values that are no numbers makes all rows so that see it.
template <int columns>
__device__ __forceinline__ void hide(float (&scores)[columns][4], const Sight& sight, float scale,
                                     const unsigned char* poisoned) {
  const int pair = lane_of_warp() % 4 * 2;
#pragma unroll
  for (int n = 0; n < columns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = kTileColumns * n + pair + i % 2;
      const bool is_seen = sight.first + token < sight.seen[i / 2];
      float score = scores[n][i] * scale;
      if (poisoned != nullptr && poisoned[token] != 0) score = NAN;
      scores[n][i] = is_seen ? score : -INFINITY;
    }
  }
}

// The highest scores of the rows: the same in all threads that have parts of them.
template <int columns>
__device__ __forceinline__ TwoRows find_highs(const float (&scores)[columns][4]) {
  TwoRows highs = {{kNothingSeen, kNothingSeen}};
#pragma unroll
  for (int n = 0; n < columns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) highs.of[i / 2] = fmaxf(highs.of[i / 2], scores[n][i]);
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    highs.of[row] = fmaxf(highs.of[row], __shfl_xor_sync(0xFFFFFFFFU, highs.of[row], 1));
    highs.of[row] = fmaxf(highs.of[row], __shfl_xor_sync(0xFFFFFFFFU, highs.of[row], 2));
  }
  return highs;
}

// Turns scores of `columns` tiles of tokens into weights and writes those to shared memory, [row]
// [token]; returns what the thread's own columns come to.
template <typename L, int columns, typename T>
__device__ __forceinline__ TwoRows weigh(const float (*scores)[4], const TwoRows& highs,
                                         T* weights) {
  const int group = lane_of_warp() / 4, pair = lane_of_warp() % 4 * 2;
  TwoRows sums = {{0.0F, 0.0F}};
#pragma unroll
  for (int n = 0; n < columns; ++n) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      Pack<T, 2> both;
      const float first = exp2f(scores[n][2 * row] - highs.of[row]);
      const float second = exp2f(scores[n][2 * row + 1] - highs.of[row]);
      sums.of[row] += first + second;
      narrow(first, both.of[0]);
      narrow(second, both.of[1]);
      T* const home = weights + (group + 8 * row) * L::kWeightRow + kTileColumns * n + pair;
      *reinterpret_cast<Pack<T, 2>*>(home) = both;
    }
  }
  return sums;
}

// A thread's part of its rows' softmax: `totals` are of its own columns only.
struct Progress {
  TwoRows highs = {{kNothingSeen, kNothingSeen}};
  TwoRows totals = {{0.0F, 0.0F}};

  // Takes up the highs of a step; returns what all before it must be multiplied with.
  __device__ __forceinline__ TwoRows raise(const TwoRows& step) {
    TwoRows factors;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float high = fmaxf(highs.of[row], step.of[row]);
      factors.of[row] = exp2f(highs.of[row] - high);
      highs.of[row] = high;
    }
    return factors;
  }

  // Adds what the step's quarters came to.
  __device__ __forceinline__ void add(int row, float factor, const float (&quarters)[kWarps]) {
    const float sum = ((quarters[0] + quarters[1]) + quarters[2]) + quarters[3];
    totals.of[row] = __fmaf_rn(totals.of[row], factor, sum);
  }

  // The whole row's, over the threads that have parts of it.
  __device__ __forceinline__ Softmax softmax(int row) const {
    float total = totals.of[row];
    total += __shfl_xor_sync(0xFFFFFFFFU, total, 1);
    total += __shfl_xor_sync(0xFFFFFFFFU, total, 2);
    return {highs.of[row], total};
  }
};

template <int tiles>
__device__ __forceinline__ void scale_sums(float (&sums)[tiles][4], const TwoRows& factors) {
#pragma unroll
  for (int n = 0; n < tiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] *= factors.of[i / 2];
  }
}

// What sums so far are multiplied with, and those of the split that joins them.
struct Join {
  float kept;
  float added;

  __device__ __forceinline__ float of(float sum, float split_sum) const {
    return __fmaf_rn(sum, kept, split_sum * added);
  }
};

__device__ __forceinline__ Join join_split(Softmax& all, const Softmax& split) {
  const float high = fmaxf(all.high, split.high);
  const Join join = {exp2f(all.high - high), exp2f(split.high - high)};
  all = {high, join.of(all.total, split.total)};
  return join;
}

}  // namespace aegaeon::ops::cuda

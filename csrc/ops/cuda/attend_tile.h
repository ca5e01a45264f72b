// What a warp makes of a tile of queries and a step of tokens in shared memory: scores, and sums of
// weighted values. Of half types on the tensor cores, of float32 by fused multiply-adds. An element
// of a result is one chain in the order of what it sums, wherever it lies: the same bits in every
// kernel.
//
// Results lie across a warp as tensor cores leave them: in a tile of 16 rows and 8 columns, lane l
// has rows l / 4 and l / 4 + 8, of each the columns 2 * (l % 4) and one more: elements [0], [1] and
// [2], [3].
#pragma once

#include "ops/cuda/compiler.h"

namespace aegaeon::ops::cuda {

template <typename T>
constexpr bool is_half = sizeof(T) == 2;

constexpr int kTileRows = 16, kTileColumns = 8;
constexpr int kWarps = 4, kThreads = 32 * kWarps;

template <typename T, int head_dim>
struct Layout {
  // Tokens taken at once: two stages of keys and values leave room for a second block on a
  // multiprocessor, where they can.
  static constexpr int kStep = sizeof(T) * head_dim <= 192 ? 64 : 32;
  static constexpr int kStages = sizeof(T) * head_dim <= 512 ? 2 : 1;
  // Elements of 16 bytes, what is copied at once.
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  // From row to row in shared memory: an odd number of chunks, so that eight rows begin in banks
  // of their own.
  static constexpr int kRow = head_dim + kChunk;
  static constexpr int kWeightRow = kStep + kChunk;
};

__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % 32; }

template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  T of[count];
};

template <int count>
__device__ __forceinline__ Pack<float, count> load_floats(const float* from) {
  return *reinterpret_cast<const Pack<float, count>*>(from);
}

// scores[n] becomes the products of 16 queries with the 8 keys from 8 * n on.
template <typename L, int head_dim, int columns>
__device__ __forceinline__ void score(const float* queries, const float* keys,
                                      float (&scores)[columns][4]) {
  const int group = lane_of_warp() / 4, pair = lane_of_warp() % 4 * 2;
#pragma unroll 2
  for (int d = 0; d < head_dim; d += 4) {
    const auto low = load_floats<4>(queries + group * L::kRow + d);
    const auto high = load_floats<4>(queries + (group + 8) * L::kRow + d);
#pragma unroll
    for (int n = 0; n < columns; ++n) {
      const float* const key = keys + (kTileColumns * n + pair) * L::kRow + d;
      const auto first = load_floats<4>(key), second = load_floats<4>(key + L::kRow);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][0] = __fmaf_rn(low.of[i], first.of[i], scores[n][0]);
        scores[n][1] = __fmaf_rn(low.of[i], second.of[i], scores[n][1]);
        scores[n][2] = __fmaf_rn(high.of[i], first.of[i], scores[n][2]);
        scores[n][3] = __fmaf_rn(high.of[i], second.of[i], scores[n][3]);
      }
    }
  }
}

// sums[n] += 16 rows of weights, of all tokens of the step, times the elements 8 * n .. of values.
template <typename L, int tiles>
__device__ __forceinline__ void add_values(const float* weights, const float* values,
                                           float (&sums)[tiles][4]) {
  const int group = lane_of_warp() / 4, pair = lane_of_warp() % 4 * 2;
#pragma unroll 1
  for (int token = 0; token < L::kStep; token += 4) {
    const auto low = load_floats<4>(weights + group * L::kWeightRow + token);
    const auto high = load_floats<4>(weights + (group + 8) * L::kWeightRow + token);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const row = values + (token + i) * L::kRow + pair;
#pragma unroll
      for (int n = 0; n < tiles; ++n) {
        const auto value = load_floats<2>(row + kTileColumns * n);
        sums[n][0] = __fmaf_rn(low.of[i], value.of[0], sums[n][0]);
        sums[n][1] = __fmaf_rn(low.of[i], value.of[1], sums[n][1]);
        sums[n][2] = __fmaf_rn(high.of[i], value.of[0], sums[n][2]);
        sums[n][3] = __fmaf_rn(high.of[i], value.of[1], sums[n][3]);
      }
    }
  }
}

// Multiplies with 32 inputs, in two steps: the first of a and half of b, then the others.
template <typename T>
__device__ __forceinline__ void multiply_twice(float (&sums)[4], const std::uint32_t (&a)[2][4],
                                               const std::uint32_t (&b)[4]) {
  const std::uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
  multiply_matrices(sums, a[0], first, T{});
  multiply_matrices(sums, a[1], second, T{});
}

// Loads 16 rows and 32 columns as the left operand of multiply_twice.
template <typename T>
__device__ __forceinline__ void load_left(std::uint32_t (&a)[2][4], const T* rows, int stride) {
  const int lane = lane_of_warp();
  const T* const from = rows + lane % 16 * stride + lane / 16 * 8;
  load_matrices<false>(a[0], from);
  load_matrices<false>(a[1], from + 16);
}

template <typename L, int head_dim, int columns, typename T>
__device__ __forceinline__ void score(const T* queries, const T* keys,
                                      float (&scores)[columns][4]) {
  const int lane = lane_of_warp();
#pragma unroll 2
  for (int d = 0; d < head_dim; d += 32) {
    std::uint32_t a[2][4], b[4];
    load_left(a, queries + d, L::kRow);
#pragma unroll
    for (int n = 0; n < columns; ++n) {
      load_matrices<false>(b, keys + (kTileColumns * n + lane % 8) * L::kRow + d + lane / 8 * 8);
      multiply_twice<T>(scores[n], a, b);
    }
  }
}

template <typename L, int tiles, typename T>
__device__ __forceinline__ void add_values(const T* weights, const T* values,
                                           float (&sums)[tiles][4]) {
#pragma unroll
  for (int token = 0; token < L::kStep; token += 32) {
    std::uint32_t a[2][4], b[4];
    load_left(a, weights + token, L::kWeightRow);
    const T* const row = values + (token + lane_of_warp()) * L::kRow;
#pragma unroll
    for (int n = 0; n < tiles; ++n) {
      load_matrices<true>(b, row + kTileColumns * n);
      multiply_twice<T>(sums[n], a, b);
    }
  }
}

}  // namespace aegaeon::ops::cuda

// The inner loop of `attend`, for any vector type: a tile of queries over one head of a sequence.
#pragma once

#include <cfloat>
#include <cstddef>

#include "ops/cpu/exp.h"
#include "ops/cpu/unroll.h"
#include "ops/ops.h"

namespace aegaeon::ops {

constexpr std::size_t kMaxTileQueries = 12;

struct AttentionTile {
  const float* keys;    // the head's page of block 0
  const float* values;  // likewise
  const std::size_t* blocks;
  std::size_t head_dim;
  const float* queries;  // [head_dim][count], scaled
  std::size_t count;
  std::size_t tokens[kMaxTileQueries];  // that a query may see, ascending
  float* sums;                          // [count][head_dim]: the result
};

struct AttentionKernel {
  std::size_t max_queries;
  void (*run)(const AttentionTile& tile);
};

AttentionKernel baseline_attention();
AttentionKernel avx2_attention();
AttentionKernel avx512_attention();

// sums[q] = sums[q] * factor[q] + sum over i of lines[i] * x[i][q], one chain each; 16 floats wide.
struct Lines {
  const float* first;
  std::size_t stride;
  std::size_t count;
  const float* x;        // [count][queries]
  const float* factors;  // [queries]; null: the sums start at zero
  float* sums;
  std::size_t sums_stride;
};

template <typename V, std::size_t queries>
void multiply_lines(const Lines& lines) {
  using Vector = typename V::Vector;
  constexpr std::size_t vectors = kBlockTokens / V::kWidth;
  Vector sums[queries * vectors];
  const float* const factors = lines.factors;
  unroll<queries * vectors>([&](auto i) {
    constexpr std::size_t query = i.at / vectors;
    const float* const from = lines.sums + query * lines.sums_stride + i.at % vectors * V::kWidth;
    sums[i.at] =
        factors == nullptr ? V::zero() : V::multiply(V::load(from), V::broadcast(factors + query));
  });
  const float* line = lines.first;
  const float* x = lines.x;
  for (std::size_t i = 0; i < lines.count; ++i, line += lines.stride, x += queries) {
    Vector loaded[vectors];
    unroll<vectors>([&](auto v) { loaded[v.at] = V::load(line + v.at * V::kWidth); });
    unroll<queries>([&](auto q) {
      const Vector factor = V::broadcast(x + q.at);
      unroll<vectors>([&](auto v) {
        constexpr std::size_t at = q.at * vectors + v.at;
        sums[at] = V::multiply_add(loaded[v.at], factor, sums[at]);
      });
    });
  }
  unroll<queries * vectors>([&](auto i) {
    V::store(lines.sums + i.at / vectors * lines.sums_stride + i.at % vectors * V::kWidth,
             sums[i.at]);
  });
}

// The same for `width` floats, less than 16.
template <typename V, std::size_t queries>
void multiply_rest(const Lines& lines, std::size_t width) {
  for (std::size_t q = 0; q < queries; ++q) {
    for (std::size_t at = 0; at < width; ++at) {
      float sum = lines.sums[q * lines.sums_stride + at] * lines.factors[q];
      for (std::size_t i = 0; i < lines.count; ++i) {
        sum =
            V::multiply_add_one(lines.first[i * lines.stride + at], lines.x[i * queries + q], sum);
      }
      lines.sums[q * lines.sums_stride + at] = sum;
    }
  }
}

// The running maximum and sum of a query's weights.
struct Softmax {
  float high = -FLT_MAX;  // finite: it is subtracted even where nothing is seen
  float total = 0.0F;
};

// Turns 16 scores into weights, zero from `visible` on; returns what earlier sums shrink by.
template <typename V>
float weigh(float* scores, std::size_t visible, Softmax& softmax) {
  float lanes[kBlockTokens];
  for (std::size_t j = 0; j < kBlockTokens; ++j) {
    scores[j] = j < visible ? scores[j] : -FLT_MAX;
    lanes[j] = scores[j];
  }
  for (std::size_t half = kBlockTokens / 2; half > 0; half /= 2) {
    for (std::size_t j = 0; j < half; ++j) {
      lanes[j] = lanes[j + half] > lanes[j] ? lanes[j + half] : lanes[j];
    }
  }
  const float high = lanes[0] > softmax.high ? lanes[0] : softmax.high;
  for (std::size_t j = 0; j < kBlockTokens; ++j) {
    const float weight = exp_float(scores[j] - high);
    scores[j] = j < visible ? weight : 0.0F;
    lanes[j] = scores[j];
  }
  for (std::size_t half = kBlockTokens / 2; half > 0; half /= 2) {
    for (std::size_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  const float shrink = exp_float(softmax.high - high);
  softmax.total = softmax.total * shrink + lanes[0];
  softmax.high = high;
  return shrink;
}

// Adds a block's weighted values to the sums.
template <typename V, std::size_t queries>
void add_values(const AttentionTile& tile, const float* values, Lines lines) {
  lines.stride = lines.sums_stride = tile.head_dim;
  std::size_t at = 0;
  for (; at + kBlockTokens <= tile.head_dim; at += kBlockTokens) {
    lines.first = values + at;
    lines.sums = tile.sums + at;
    multiply_lines<V, queries>(lines);
  }
  if (at < tile.head_dim) {
    lines.first = values + at;
    lines.sums = tile.sums + at;
    multiply_rest<V, queries>(lines, tile.head_dim - at);
  }
}

template <typename V, std::size_t queries>
void run_tile(const AttentionTile& tile) {
  Softmax softmax[queries];
  float scores[queries * kBlockTokens];
  float weights[queries * kBlockTokens];  // [tokens][queries]
  float shrink[queries];
  for (std::size_t at = 0; at < queries * tile.head_dim; ++at) tile.sums[at] = 0.0F;
  const std::size_t most = tile.tokens[queries - 1];
  const std::size_t page_floats = kBlockTokens * tile.head_dim;
  for (std::size_t first = 0; first < most; first += kBlockTokens) {
    const std::size_t page = tile.blocks[first / kBlockTokens] * page_floats;
    multiply_lines<V, queries>({tile.keys + page, kBlockTokens, tile.head_dim, tile.queries,
                                nullptr, scores, kBlockTokens});
    for (std::size_t q = 0; q < queries; ++q) {
      float* const row = scores + q * kBlockTokens;
      const std::size_t visible = tile.tokens[q] > first ? tile.tokens[q] - first : 0;
      shrink[q] = weigh<V>(row, visible, softmax[q]);
      for (std::size_t j = 0; j < kBlockTokens; ++j) weights[j * queries + q] = row[j];
    }
    const std::size_t there = most - first < kBlockTokens ? most - first : kBlockTokens;
    add_values<V, queries>(tile, tile.values + page,
                           {nullptr, 0, there, weights, shrink, nullptr, 0});
  }
  for (std::size_t q = 0; q < queries; ++q) {
    float* const row = tile.sums + q * tile.head_dim;
    for (std::size_t at = 0; at < tile.head_dim; ++at) row[at] /= softmax[q].total;
  }
}

// Finds the function of exactly tile.count queries.
template <typename V, std::size_t queries = V::kMaxRows>
void attend_tile(const AttentionTile& tile) {
  if (tile.count == queries) {
    run_tile<V, queries>(tile);
  } else if constexpr (queries > 1) {
    attend_tile<V, queries - 1>(tile);
  }
}

}  // namespace aegaeon::ops

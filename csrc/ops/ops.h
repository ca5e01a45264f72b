// The operators of a forward pass: one params struct each, with formula, layouts and limits.
// Activations are float32, rows one after another. Row i of a result depends on row i of the
// operands alone, to the bit: how many rows there are, which, and on how many threads never shows.
#pragma once

#include <cstddef>
#include <cstdint>

namespace aegaeon::ops {

class ThreadPool;

enum class WeightType : int { f32 = 0, bf16 = 1, f16 = 2 };

// Outputs that lie side by side in memory.
constexpr std::size_t kTileOutputs = 32;

// A weight [out_features, in_features] in tiles: [ceil(out / 32)][in_features][32] elements,
// 64-byte aligned; output o of a tile's k-th line is weight[32 * tile + o][k], zero beyond
// out_features.
struct Matrix {
  const void* tiles;
  std::size_t out_features;
  WeightType type;
};

// A matrix and what is added to its outputs.
struct BiasedMatrix {
  Matrix matrix;
  const float* bias;  // [out_features], or null
};

// out[r][c] = sum over k of x[r][k] * w[c][k], + bias[c], where w and bias are those of `parts`,
// one below the other.
// Each sum is one chain of fused multiply-adds over k = 0, 1, ... from zero; products and sums are
// rounded apart where the processor cannot fuse. The bias is added last.
struct LinearParams {
  const float* x;  // [rows, in_features]
  std::size_t rows;
  std::size_t in_features;
  const BiasedMatrix* parts;
  std::size_t part_count;
  float* out;  // [rows, sum of out_features]
};

// out[r][k] = table[token_ids[r]][k]. Throws std::out_of_range for an id outside the table.
struct EmbedParams {
  const std::int64_t* token_ids;  // [rows]
  std::size_t rows;
  std::size_t in_features;
  Matrix table;
  float* out;  // [rows, in_features]
};

void linear(ThreadPool& pool, const LinearParams& params);
void embed(ThreadPool& pool, const EmbedParams& params);

}  // namespace aegaeon::ops

// The operators of a forward pass: one params struct each, with formula, layouts and limits.
// Activations are float32, rows one after another. Row i of a result depends on row i of the
// operands alone, to the bit: how many rows there are, which, and on how many threads never shows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace aegaeon::ops {

class ThreadPool;

enum class WeightType : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };

// What x is made before it meets weights of bf16: left as it is, or rounded to bf16 half to even;
// then what is subnormal, of factors and sums, may count as zero.
enum class XType : int { f32 = 0, bf16 = 1 };

// Outputs that lie side by side in memory.
constexpr std::size_t kTileOutputs = 32;
// Inputs of an int8 weight that share a scale.
constexpr std::size_t kGroupInputs = 64;

// A weight [out_features, in_features] in tiles of 32 outputs, 64-byte aligned.
// f32 and f16: [ceil(out / 32)][in_features][32] elements; output o of a tile's k-th line is
// weight[32 * tile + o][k], zero beyond out_features.
// bf16: [ceil(out / 32)][in_features / 2][32][2] elements, the inputs 2 * j and 2 * j + 1 of an
// output side by side, as instructions for products of bf16 take them; in_features is even.
// i8: a tile is a sequence of groups of 64 inputs, of which the last may be shorter. A group is a
// line of 32 scales (bf16, not negative), one for each output, then a line of 64 int8 for every two
// inputs: the weights 2 * j and 2 * j + 1 of output o are the bytes 2 * o and 2 * o + 1 of its j-th
// line, -127 .. 127, zero beyond in_features and out_features. A weight is its byte times its
// scale.
struct Matrix {
  const void* tiles;
  std::size_t out_features;
  WeightType type;
  XType x_type = XType::f32;  // bf16 only with weights of bf16
};

// A matrix and what is added to its outputs.
struct BiasedMatrix {
  Matrix matrix;
  const float* bias;  // [out_features], or null
};

// out[r][c] = sum over k of x[r][k] * w[c][k], + bias[c], where w and bias are those of `parts`,
// one below the other.
// Each sum is one chain of fused multiply-adds from zero, over k = 0, 1, 2, ... and with weights of
// bf16 over 1, 0, 3, 2, ..., which is the order of instructions for pairs of bf16; products and
// sums are rounded apart where the processor cannot fuse. Then the bias is added, then
// residual[r][c]. Before it meets int8 weights, x is rounded to 16 bits, group by group: x ~ q * s,
// where s = max(max |x| / 32767, 2^-126), |q| <= 32767 and |x - q * s| <= s / 2 but for the last
// bits of a float. A group's sum of q * w is exact in 32 bits: at most 64 * 32767 * 127 < 2^28; the
// chain is then over groups, of (float(sum) * the weights' scale) times s. Infinity or NaN in x
// makes its whole row NaN.
struct LinearParams {
  const float* x;  // [rows, in_features]
  std::size_t rows;
  std::size_t in_features;
  const BiasedMatrix* parts;
  std::size_t part_count;
  const float* residual;  // as `out`, or null
  float* out;             // [rows, sum of out_features]
};

// out = gate / (1 + exp(-gate)) * up, where gate and up are the products of x with gate_up[0] and
// gate_up[1], biases included, to the bit as `linear` makes them; both have as many outputs.
struct GatedParams {
  const float* x;  // [rows, in_features]
  std::size_t rows;
  std::size_t in_features;
  const BiasedMatrix* gate_up;
  float* out;  // [rows, out_features of either]
};

// out[r][k] = table[token_ids[r]][k]. Throws std::out_of_range for an id outside the table.
struct EmbedParams {
  const std::int64_t* token_ids;  // [rows]
  std::size_t rows;
  std::size_t in_features;
  Matrix table;
  float* out;  // [rows, in_features]
};

// Rows that lie `stride` floats apart.
struct Rows {
  const float* first;
  std::size_t stride;
};

// out[r][h][i] = x[r][h][i] / sqrt(mean over i of x[r][h][i]^2 + eps) * weight[i], where row r of x
// is its row chosen[r] if some are chosen.
struct RmsNormParams {
  Rows x;  // [rows, heads * features]
  std::size_t rows;
  std::size_t heads;  // each normed by itself
  std::size_t features;
  const float* weight;  // [features]
  float eps;
  float* out;                  // [rows, heads, features]
  const std::int64_t* chosen;  // [rows], rows of x; or null
};

// Turns the pairs (i, i + head_dim / 2) of each head: out = x * cos + swapped(x) * sin, where
// swapped(x) is -x[i + head_dim / 2] in the lower half and x[i - head_dim / 2] in the upper one.
struct RotateParams {
  Rows x;  // [rows, heads * head_dim]
  std::size_t rows;
  std::size_t heads;
  std::size_t head_dim;  // even
  const float* cos;      // [rows, head_dim]
  const float* sin;      // [rows, head_dim]
  float* out;            // [rows, heads, head_dim]
};

// Tokens of a page: one head's keys or values in one layer.
constexpr std::size_t kBlockTokens = 16;

// The rows of one sequence in a pass, at positions start .. start + rows - 1; `blocks` are the ids
// of the blocks that hold positions 0 .. start + rows - 1.
struct SequenceRows {
  std::size_t first_row;
  std::size_t rows;
  std::size_t start;
  std::vector<std::size_t> blocks;
};

// What an element of keys and values is; f16 is for CUDA only. bf16 is rounded half to even where
// it is stored and widened exactly where it is used; everything else stays float32.
enum class KvType : int { f32 = 0, bf16 = 1, f16 = 2 };

// Where a pass finds keys and values. Block b of a layer owns the pages b + layer * 2 * kv_heads +
// head (keys) and + kv_heads more (values). A page of keys is [head_dim][16 tokens], so that scores
// are products with lines of it; of bf16 it has the dimensions in pairs, [head_dim / 2][16 tokens]
// [2], and an odd last one by itself, so that lines are widened in place. A page of values is
// [16 tokens][head_dim].
struct PagedKv {
  void* pages;
  std::size_t kv_heads;
  std::size_t head_dim;
  std::vector<SequenceRows> sequences;
  KvType type = KvType::f32;

  std::size_t element_bytes() const { return type == KvType::f32 ? 4 : 2; }
  std::size_t page_bytes() const { return kBlockTokens * head_dim * element_bytes(); }
};

// Stores the rows' keys and values, both [rows, kv_heads * head_dim], at their positions.
struct AppendParams {
  const PagedKv& kv;
  std::size_t layer;
  Rows keys;
  Rows values;
};

// out[r][h] = softmax over t of (queries[r][h] . key_t * scale) times value_t, for tokens t up to
// and with r's position. Splits of 512 tokens have a softmax each, and are added up in their order
// as the online softmax does (Milakov & Gimelshein 2018): who computes which of them never shows.
// Later tokens' keys may be read, and count for nothing whatever is there; their values are not.
struct AttendParams {
  const PagedKv& kv;
  std::size_t layer;
  std::size_t heads;     // a multiple of kv_heads
  const float* queries;  // [rows, heads, head_dim]
  float scale;
  float* out;  // [rows, heads, head_dim]
};

void append_kv(ThreadPool& pool, const AppendParams& params);
void attend(ThreadPool& pool, const AttendParams& params);
void rms_norm(ThreadPool& pool, const RmsNormParams& params);
void rotate(ThreadPool& pool, const RotateParams& params);
void linear(ThreadPool& pool, const LinearParams& params);
void gated(ThreadPool& pool, const GatedParams& params);
void embed(ThreadPool& pool, const EmbedParams& params);

}  // namespace aegaeon::ops

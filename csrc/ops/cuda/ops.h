// The operators on a CUDA device, by the names and params of ops/ops.h: pointers are the device's,
// and what is asked for happens on a stream, after what was asked before. Nothing is allocated.
// Products are not here: torch has the vendor's.
#pragma once

#include "ops/cuda/tables.h"
#include "ops/ops.h"

struct CUstream_st;

namespace aegaeon::ops::cuda {

using Stream = CUstream_st*;  // the runtime's cudaStream_t

// Of float32, results are the bits of the CPU's but for the order of sums, and exp; a row depends
// on that row alone all the same.

// x + residual, which `sum` becomes, is what is normed instead of `norm.x`; `norm.chosen` is null.
// Without a sum, x is normed as it is. Where `rounded` is there, the result goes there as bf16,
// half to even, and not to `norm.out`: what is multiplied next takes it as it is.
struct AddRmsNormParams {
  RmsNormParams norm;
  const float* residual;  // [rows, heads * features]
  float* sum;             // likewise; may be `residual`, or x where that lies in one piece
  void* rounded = nullptr;
};

// out[r][i] = gate[r][i] / (1 + exp(-gate[r][i])) * up[r][i], where gate and up are finished first:
// times the row's scale, plus their bias. `rounded` is as above.
struct SiluMulParams {
  Rows gate;
  Rows up;
  std::size_t rows;
  std::size_t features;
  float* out;  // [rows, features]
  void* rounded = nullptr;
  const float* scales = nullptr;     // [rows]
  const float* gate_bias = nullptr;  // [features]
  const float* up_bias = nullptr;
};

// x as what it is multiplied with: bf16, or f16 where a row with an element beyond f16's is divided
// by its scale before, a power of two (1 for other rows, and for those with infinity or NaN). What
// that makes subnormal is 2^-28 of the row's largest and less.
struct NarrowParams {
  Rows x;
  std::size_t rows;
  std::size_t features;
  WeightType type;  // bf16 or f16; others throw std::invalid_argument
  void* out;        // [rows, features]
  float* scales;    // [rows], of f16
};

// The most parts of a product that have biases of their own: queries, keys, values.
constexpr std::size_t kMostParts = 3;

// What turns products into the operator's result, in place: out[r][c] = out[r][c] * scales[r] +
// the bias of c's part + residual[r][c], each where it is there.
struct FinishParams {
  float* out;  // [rows, features]
  std::size_t rows;
  std::size_t features;
  const float* scales;    // [rows]
  const float* residual;  // [rows, features]
  const float* biases[kMostParts];
  std::size_t ends[kMostParts];  // the columns behind each part
};

void rms_norm(Stream stream, const RmsNormParams& params);
void add_rms_norm(Stream stream, const AddRmsNormParams& params);
void silu_mul(Stream stream, const SiluMulParams& params);
void narrow_rows(Stream stream, const NarrowParams& params);
void finish_product(Stream stream, const FinishParams& params);
// `table.tiles` are plain rows here, [out_features][in_features]; of int8 it throws
// std::invalid_argument. The row of an id outside the table becomes NaN: a kernel cannot throw.
void embed(Stream stream, const EmbedParams& params);

void rotate(Stream stream, const RotateParams& params);
void append_kv(Stream stream, const DeviceTables& tables, const AppendParams& params);
// Both in one: rotates `queries`, and appends keys rotated by the same angles, and values.
void rotate_and_append(Stream stream, const DeviceTables& tables, const RotateParams& queries,
                       const AppendParams& params);

// Blocks on their way out or in: between pages and a stage where they lie one after another.
struct CopyBlocksParams {
  void* pages;                 // 16-byte aligned, as `stage` is
  std::size_t page_bytes;      // a multiple of 16
  std::size_t block_pages;     // of all layers
  const std::int32_t* blocks;  // [count], on the device
  std::size_t count;
  void* stage;  // [count][block_pages][page_bytes]
};

void gather_blocks(Stream stream, const CopyBlocksParams& params);
void scatter_blocks(Stream stream, const CopyBlocksParams& params);

// `params.kv` is what `tables` were made of; pages and queries are 16-byte aligned. head_dim is 64,
// 96, 128 or 256; else it throws std::invalid_argument. Of half types of KV, queries and weights
// are rounded to them, and sums are of tensor cores.
void attend(Stream stream, const DeviceTables& tables, const AttendParams& params);
// Shared memory that a block of its kernels takes; by what it throws, as `attend`.
std::size_t attend_shared_bytes(KvType type, std::size_t head_dim);

}  // namespace aegaeon::ops::cuda

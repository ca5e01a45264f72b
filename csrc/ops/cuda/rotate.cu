// rotate, append_kv and both in one: a block of threads for each row, a thread for each pair of a
// head's elements.

#include "ops/cuda/compiler.h"
#include "ops/cuda/ops.h"

namespace aegaeon::ops::cuda {
namespace {

constexpr int kRowThreads = 256;

struct RotateCall {
  RotateParams queries;  // the angles are the keys', too; cos is null where nothing is rotated
  Rows keys;
  Rows values;
  const RowPlace* places;  // [rows], or null where nothing is appended
  void* pages;
  std::size_t first_page;
  std::size_t kv_heads;
};

struct Pair {
  float low;
  float high;
};

// The elements i and i + half of a head, rotated if there are angles.
__device__ __forceinline__ Pair load_pair(const float* x, const RotateParams& angles,
                                          std::size_t row, std::size_t i) {
  const std::size_t half = angles.head_dim / 2;
  const Pair pair = {x[i], x[i + half]};
  if (angles.cos == nullptr) return pair;
  const float* const cos = angles.cos + row * angles.head_dim;
  const float* const sin = angles.sin + row * angles.head_dim;
  return {pair.low * cos[i] - pair.high * sin[i],
          pair.high * cos[i + half] + pair.low * sin[i + half]};
}

template <typename T>
__device__ __forceinline__ void append_row(const RotateCall& call, std::size_t row) {
  const std::size_t head_dim = call.queries.head_dim, half = head_dim / 2;
  const RowPlace place = call.places[row];
  if (place.block < 0) return;
  const std::size_t first = static_cast<std::size_t>(place.block) + call.first_page;
  for (std::size_t at = threadIdx.x; at < 2 * call.kv_heads * half; at += kRowThreads) {
    const std::size_t page = at / half, i = at % half;
    const bool is_key = page < call.kv_heads;
    RotateParams angles = call.queries;
    if (!is_key) angles.cos = nullptr;
    const Rows& from = is_key ? call.keys : call.values;
    const std::size_t head = is_key ? page : page - call.kv_heads;
    const Pair pair = load_pair(from.first + row * from.stride + head * head_dim, angles, row, i);
    T* const to =
        static_cast<T*>(call.pages) +
        ((first + page) * kBlockTokens + static_cast<std::size_t>(place.offset)) * head_dim;
    narrow(pair.low, to[i]);
    narrow(pair.high, to[i + half]);
  }
}

// Blocks: [row].
template <typename T>
__global__ void __launch_bounds__(kRowThreads) rotate_rows(const RotateCall call) {
  const RotateParams& queries = call.queries;
  const std::size_t half = queries.head_dim / 2, row = blockIdx.x;
  for (std::size_t at = threadIdx.x; at < queries.heads * half; at += kRowThreads) {
    const std::size_t head = at / half, i = at % half;
    const float* const x = queries.x.first + row * queries.x.stride + head * queries.head_dim;
    const Pair pair = load_pair(x, queries, row, i);
    float* const out = queries.out + (row * queries.heads + head) * queries.head_dim;
    out[i] = pair.low;
    out[i + half] = pair.high;
  }
  if (call.places != nullptr) append_row<T>(call, row);
}

template <typename T>
void launch_as(Stream stream, const RotateCall& call) {
  if (call.queries.rows == 0) return;
  const auto rows = static_cast<unsigned>(call.queries.rows);
  launch(&rotate_rows<T>, {{rows, 1, 1}, kRowThreads, 0}, stream, call);
}

void append(Stream stream, const DeviceTables& tables, const RotateParams& queries,
            const AppendParams& params) {
  const PagedKv& kv = params.kv;
  const RotateCall call = {queries,         params.keys, params.values,
                           tables.places(), kv.pages,    params.layer * 2 * kv.kv_heads,
                           kv.kv_heads};
  switch (kv.type) {
    case KvType::f32:
      return launch_as<float>(stream, call);
    case KvType::bf16:
      return launch_as<Bf16>(stream, call);
    case KvType::f16:
      return launch_as<F16>(stream, call);
  }
}

}  // namespace

void rotate(Stream stream, const RotateParams& params) {
  launch_as<float>(stream, {params, {}, {}, nullptr, nullptr, 0, 0});
}

void rotate_and_append(Stream stream, const DeviceTables& tables, const RotateParams& queries,
                       const AppendParams& params) {
  append(stream, tables, queries, params);
}

void append_kv(Stream stream, const DeviceTables& tables, const AppendParams& params) {
  RotateParams nothing = {};
  nothing.rows = tables.bounds.rows;
  nothing.head_dim = params.kv.head_dim;
  append(stream, tables, nothing, params);
}

}  // namespace aegaeon::ops::cuda

// append_kv: a row's keys go across the lines of their pages, its values along one.

#include <algorithm>
#include <cstdint>

#include "ops/cpu/narrow.h"
#include "ops/cpu/thread_pool.h"
#include "ops/ops.h"

namespace aegaeon::ops {
namespace {

constexpr std::size_t kRowsPerClaim = 8;

// Token `offset` of a page of keys.
void put_key(const PagedKv& kv, char* page, std::size_t offset, const float* key) {
  if (kv.type == KvType::f32) {
    float* const to = reinterpret_cast<float*>(page) + offset;
    for (std::size_t i = 0; i < kv.head_dim; ++i) to[i * kBlockTokens] = key[i];
    return;
  }
  auto* const to = reinterpret_cast<std::uint16_t*>(page);
  const std::size_t paired = kv.head_dim / 2 * 2;
  for (std::size_t i = 0; i < paired; i += 2) {
    to[i * kBlockTokens + offset * 2] = narrow_bf16(key[i]);
    to[i * kBlockTokens + offset * 2 + 1] = narrow_bf16(key[i + 1]);
  }
  if (paired < kv.head_dim) to[paired * kBlockTokens + offset] = narrow_bf16(key[paired]);
}

void put_value(const PagedKv& kv, char* page, std::size_t offset, const float* value) {
  if (kv.type == KvType::f32) {
    std::copy_n(value, kv.head_dim, reinterpret_cast<float*>(page) + offset * kv.head_dim);
    return;
  }
  auto* const to = reinterpret_cast<std::uint16_t*>(page) + offset * kv.head_dim;
  for (std::size_t i = 0; i < kv.head_dim; ++i) to[i] = narrow_bf16(value[i]);
}

void append_row(const AppendParams& params, const SequenceRows& sequence, std::size_t at) {
  const PagedKv& kv = params.kv;
  const std::size_t position = sequence.start + at, offset = position % kBlockTokens;
  const std::size_t block = sequence.blocks[position / kBlockTokens];
  const std::size_t page_bytes = kv.page_bytes(), row = sequence.first_row + at;
  char* const pages =
      static_cast<char*>(kv.pages) + (block + params.layer * 2 * kv.kv_heads) * page_bytes;
  const float* const keys = params.keys.first + row * params.keys.stride;
  const float* const values = params.values.first + row * params.values.stride;
  for (std::size_t head = 0; head < kv.kv_heads; ++head) {
    put_key(kv, pages + head * page_bytes, offset, keys + head * kv.head_dim);
    put_value(kv, pages + (kv.kv_heads + head) * page_bytes, offset, values + head * kv.head_dim);
  }
}

}  // namespace

void append_kv(ThreadPool& pool, const AppendParams& params) {
  std::size_t rows = 0;
  for (const SequenceRows& sequence : params.kv.sequences) rows += sequence.rows;
  // Rows of all sequences are one line of work: those that decode have one each.
  pool.for_ranges(rows, kRowsPerClaim, [&](std::size_t first, std::size_t last) {
    std::size_t begin = 0;
    for (const SequenceRows& sequence : params.kv.sequences) {
      const std::size_t from = std::max(first, begin), to = std::min(last, begin + sequence.rows);
      for (std::size_t row = from; row < to; ++row) append_row(params, sequence, row - begin);
      begin += sequence.rows;
    }
  });
}

}  // namespace aegaeon::ops

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

// Appends the sequence's rows from `at` on that go to the same block, at most `rows`; returns how
// many. Head by head: a page stays in the first cache while the rows go across its lines.
std::size_t append_block(const AppendParams& params, const SequenceRows& sequence, std::size_t at,
                         std::size_t rows) {
  const PagedKv& kv = params.kv;
  const std::size_t position = sequence.start + at, offset = position % kBlockTokens;
  const std::size_t count = std::min(rows, kBlockTokens - offset);
  const std::size_t block = sequence.blocks[position / kBlockTokens];
  const std::size_t page_bytes = kv.page_bytes(), row = sequence.first_row + at;
  char* const pages =
      static_cast<char*>(kv.pages) + (block + params.layer * 2 * kv.kv_heads) * page_bytes;
  const Rows &keys = params.keys, &values = params.values;
  for (std::size_t head = 0; head < kv.kv_heads; ++head) {
    char* const key_page = pages + head * page_bytes;
    char* const value_page = key_page + kv.kv_heads * page_bytes;
    const float* key = keys.first + row * keys.stride + head * kv.head_dim;
    const float* value = values.first + row * values.stride + head * kv.head_dim;
    for (std::size_t t = 0; t < count; ++t, key += keys.stride) {
      put_key(kv, key_page, offset + t, key);
    }
    for (std::size_t t = 0; t < count; ++t, value += values.stride) {
      put_value(kv, value_page, offset + t, value);
    }
  }
  return count;
}

}  // namespace

void append_kv(ThreadPool& pool, const AppendParams& params) {
  std::size_t rows = 0;
  for (const SequenceRows& sequence : params.kv.sequences) rows += sequence.rows;
  // Rows of all sequences are one line of work: those that decode have one each.
  // Where there are many, by blocks: then seldom two threads write to the same lines.
  const bool is_many = rows >= kBlockTokens * pool.threads();
  const std::size_t grain = is_many ? kBlockTokens : kRowsPerClaim;
  pool.for_ranges(rows, grain, [&](std::size_t first, std::size_t last) {
    std::size_t begin = 0;
    for (const SequenceRows& sequence : params.kv.sequences) {
      const std::size_t from = std::max(first, begin), to = std::min(last, begin + sequence.rows);
      for (std::size_t row = from; row < to;) {
        row += append_block(params, sequence, row - begin, to - row);
      }
      begin += sequence.rows;
    }
  });
}

}  // namespace aegaeon::ops

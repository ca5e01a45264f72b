// How `attend` is cut: each sequence and KV head by itself, its queries in tiles of nearly one
// size.

#include <algorithm>
#include <vector>

#include "ops/cpu/attention_tile.h"
#include "ops/cpu/isa.h"
#include "ops/cpu/panels.h"
#include "ops/cpu/thread_pool.h"
#include "ops/ops.h"

namespace aegaeon::ops {
namespace {

// Keys times queries that are worth waking another thread for.
constexpr std::size_t kClaimScores = 1024;
constexpr std::size_t kRowsPerClaim = 8;

AttentionKernel attention_kernel() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::avx512:
      return avx512_attention();
    case Isa::avx2:
      return avx2_attention();
    default:
      break;
  }
#endif
  return baseline_attention();
}

// Queries first .. first + count - 1 of a sequence and KV head, ordered [row][head of the group].
struct Unit {
  const SequenceRows* sequence;
  std::size_t kv_head;
  std::size_t first;
  std::size_t count;
};

std::vector<Unit> units_of(const AttendParams& params, std::size_t max_queries) {
  std::vector<Unit> units;
  const std::size_t group = params.heads / params.kv.kv_heads;
  for (const SequenceRows& sequence : params.kv.sequences) {
    if (sequence.rows == 0) continue;
    const Panels tiles(sequence.rows * group, max_queries);
    for (std::size_t head = 0; head < params.kv.kv_heads; ++head) {
      for (std::size_t tile = 0; tile < tiles.count(); ++tile) {
        units.push_back({&sequence, head, tiles.first_row(tile), tiles.rows(tile)});
      }
    }
  }
  return units;
}

// Offset of a unit's query in queries and out.
std::size_t offset_of(const AttendParams& params, const Unit& unit, std::size_t query) {
  const std::size_t group = params.heads / params.kv.kv_heads;
  const std::size_t row = unit.sequence->first_row + (unit.first + query) / group;
  const std::size_t head = unit.kv_head * group + (unit.first + query) % group;
  return (row * params.heads + head) * params.kv.head_dim;
}

void attend_unit(const AttendParams& params, const Unit& unit, const AttentionKernel& kernel) {
  thread_local std::vector<float> scratch;
  const std::size_t head_dim = params.kv.head_dim, group = params.heads / params.kv.kv_heads;
  scratch.resize(2 * unit.count * head_dim);
  float* const queries = scratch.data();
  float* const sums = queries + unit.count * head_dim;
  const std::size_t head = params.layer * 2 * params.kv.kv_heads + unit.kv_head;
  const float* const keys = params.kv.pages + head * params.kv.page_floats();
  const float* const values = keys + params.kv.kv_heads * params.kv.page_floats();
  AttentionTile tile{keys, values, unit.sequence->blocks.data(), head_dim, queries, unit.count,
                     {},   sums};
  for (std::size_t query = 0; query < unit.count; ++query) {
    tile.tokens[query] = unit.sequence->start + (unit.first + query) / group + 1;
    const float* const from = params.queries + offset_of(params, unit, query);
    for (std::size_t at = 0; at < head_dim; ++at) {
      queries[at * unit.count + query] = from[at] * params.scale;
    }
  }
  kernel.run(tile);
  for (std::size_t query = 0; query < unit.count; ++query) {
    const float* const from = sums + query * head_dim;
    std::copy(from, from + head_dim, params.out + offset_of(params, unit, query));
  }
}

void append_row(const AppendParams& params, const SequenceRows& sequence, std::size_t at) {
  const PagedKv& kv = params.kv;
  const std::size_t position = sequence.start + at, offset = position % kBlockTokens;
  const std::size_t block = sequence.blocks[position / kBlockTokens];
  const std::size_t first_page = block + params.layer * 2 * kv.kv_heads;
  const std::size_t row = sequence.first_row + at;
  for (std::size_t head = 0; head < kv.kv_heads; ++head) {
    float* const keys = kv.pages + (first_page + head) * kv.page_floats() + offset;
    const float* const key = params.keys.first + row * params.keys.stride + head * kv.head_dim;
    for (std::size_t i = 0; i < kv.head_dim; ++i) keys[i * kBlockTokens] = key[i];
    float* const values = kv.pages + (first_page + kv.kv_heads + head) * kv.page_floats();
    const float* const value =
        params.values.first + row * params.values.stride + head * kv.head_dim;
    std::copy(value, value + kv.head_dim, values + offset * kv.head_dim);
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

void attend(ThreadPool& pool, const AttendParams& params) {
  const AttentionKernel kernel = attention_kernel();
  const std::vector<Unit> units = units_of(params, kernel.max_queries);
  std::size_t scores = 0;
  for (const Unit& unit : units) {
    scores += unit.count * (unit.sequence->start + unit.sequence->rows);
  }
  const std::size_t each = units.empty() ? 1 : scores / units.size() + 1;
  const std::size_t grain = std::max<std::size_t>(1, kClaimScores / each);
  pool.for_ranges(units.size(), grain, [&](std::size_t first, std::size_t last) {
    for (std::size_t at = first; at < last; ++at) attend_unit(params, units[at], kernel);
  });
}

}  // namespace aegaeon::ops

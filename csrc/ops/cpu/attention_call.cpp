#include "ops/cpu/attention_call.h"

#include <algorithm>

#include "ops/cpu/exp.h"
#include "ops/cpu/kernel_choice.h"

namespace aegaeon::ops {

AttentionCall::AttentionCall(const AttendParams& params)
    : params_(params),
      kernel_(attention_for(params.kv.type)),
      group_(params.heads / params.kv.kv_heads) {}

Tile AttentionCall::tile_of(const SequenceRows& sequence, std::size_t kv_head,
                            std::size_t at) const {
  const Panels tiles = tiles_of(sequence);
  return {&sequence, kv_head, tiles.first_row(at), tiles.rows(at)};
}

// Of a tile's query in queries and out.
std::size_t AttentionCall::offset_of(const Tile& tile, std::size_t query) const {
  const std::size_t row = tile.sequence->first_row + (tile.first + query) / group_;
  const std::size_t head = tile.kv_head * group_ + (tile.first + query) % group_;
  return (row * params_.heads + head) * head_dim();
}

void AttentionCall::pack(const Tile& tile, float* queries) const {
  for (std::size_t query = 0; query < tile.count; ++query) {
    const float* const from = params_.queries + offset_of(tile, query);
    for (std::size_t at = 0; at < head_dim(); ++at) {
      queries[at * tile.count + query] = from[at] * params_.scale;
    }
  }
}

const char* AttentionCall::page(const Tile& tile, std::size_t block, bool is_value) const {
  const PagedKv& kv = params_.kv;
  const std::size_t head = (params_.layer * 2 + is_value) * kv.kv_heads + tile.kv_head;
  return static_cast<const char*>(kv.pages) +
         (tile.sequence->blocks[block] + head) * kv.page_bytes();
}

SplitTile AttentionCall::split_of(const Tile& tile, std::size_t split, const float* queries) const {
  SplitTile part;
  part.head_dim = head_dim();
  part.count = tile.count;
  part.queries = queries;
  const std::size_t first = split * kSplitTokens;
  for (std::size_t query = 0; query < tile.count; ++query) {
    const std::size_t seen = tokens_seen(tile, query);
    part.visible[query] = std::min(seen > first ? seen - first : 0, kSplitTokens);
  }
  const std::size_t blocks = blocks_of(part);
  for (std::size_t at = 0; at < blocks; ++at) {
    part.pages[at] = page(tile, split * kSplitBlocks + at, false);
    part.pages[blocks + at] = page(tile, split * kSplitBlocks + at, true);
  }
  std::fill_n(part.pages + 2 * blocks, kMaxPages, part.pages[2 * blocks - 1]);
  return part;
}

void AttentionCall::read_next(SplitTile& part, const Tile& tile, std::size_t split) const {
  const char** const next = part.pages + 2 * blocks_of(part);
  const std::size_t blocks = (tokens_seen(tile) + kBlockTokens - 1) / kBlockTokens;
  const std::size_t first = split * kSplitBlocks;
  for (std::size_t at = 0; at < kMaxPages && first + at < blocks; ++at) {
    next[at] = page(tile, first + at, false);
  }
}

void AttentionCall::write(const Tile& tile, const Softmax* softmax, const float* sums) const {
  for (std::size_t query = 0; query < tile.count; ++query, sums += head_dim()) {
    float* const out = params_.out + offset_of(tile, query);
    const float total = softmax[query].total;
    for (std::size_t at = 0; at < head_dim(); ++at) out[at] = sums[at] / total;
  }
}

void join_split(const Softmax& split, const float* split_sums, Softmax& all, float* sums,
                std::size_t head_dim) {
  const float high = split.high > all.high ? split.high : all.high;
  const float shrink = exp_float(all.high - high), factor = exp_float(split.high - high);
  for (std::size_t at = 0; at < head_dim; ++at) {
    sums[at] = sums[at] * shrink + split_sums[at] * factor;
  }
  all.total = all.total * shrink + split.total * factor;
  all.high = high;
}

}  // namespace aegaeon::ops

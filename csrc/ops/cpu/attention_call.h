// One call of `attend`: what a tile of queries takes of its operands, and gives back.
#pragma once

#include <cstddef>

#include "ops/cpu/attention_split.h"
#include "ops/cpu/panels.h"
#include "ops/ops.h"

namespace aegaeon::ops {

// Queries first .. first + count - 1 of a sequence and KV head, ordered [row][head of the group].
struct Tile {
  const SequenceRows* sequence;
  std::size_t kv_head;
  std::size_t first;
  std::size_t count;
};

class AttentionCall {
 public:
  // Keeps `params`.
  explicit AttentionCall(const AttendParams& params);

  std::size_t kv_heads() const { return params_.kv.kv_heads; }
  std::size_t head_dim() const { return params_.kv.head_dim; }

  // The queries of one KV head of a sequence, and those as tiles of nearly one size.
  std::size_t queries_of(const SequenceRows& sequence) const { return sequence.rows * group_; }
  Panels tiles_of(const SequenceRows& sequence) const {
    return {queries_of(sequence), kernel_.max_queries};
  }
  Tile tile_of(const SequenceRows& sequence, std::size_t kv_head, std::size_t at) const;

  // Tokens that a query of the tile may see, from the sequence's first.
  std::size_t tokens_seen(const Tile& tile, std::size_t query) const {
    return tile.sequence->start + (tile.first + query) / group_ + 1;
  }
  std::size_t tokens_seen(const Tile& tile) const { return tokens_seen(tile, tile.count - 1); }
  std::size_t splits_of(const Tile& tile) const {
    return (tokens_seen(tile) + kSplitTokens - 1) / kSplitTokens;
  }

  // Lays the queries of a tile side by side, scaled: [head_dim][count].
  void pack(const Tile& tile, float* queries) const;

  // A split of a tile without where its results go; whoever reads next reads split `next` of it.
  SplitTile split_of(const Tile& tile, std::size_t split, const float* queries) const;
  void read_next(SplitTile& part, const Tile& tile, std::size_t split) const;
  void run(SplitTile& part) const { kernel_.run(part); }

  // Writes a tile's rows: `sums` over the totals.
  void write(const Tile& tile, const Softmax* softmax, const float* sums) const;

 private:
  std::size_t offset_of(const Tile& tile, std::size_t query) const;
  const char* page(const Tile& tile, std::size_t block, bool is_value) const;

  const AttendParams& params_;
  const AttentionKernel kernel_;
  const std::size_t group_;  // heads that share a KV head
};

// Adds a split to those before it: `all` and `sums` begin as Softmax{} and zero.
void join_split(const Softmax& split, const float* split_sums, Softmax& all, float* sums,
                std::size_t head_dim);

}  // namespace aegaeon::ops

// What kernels must know of a PagedKv, as words that one copy brings to the device. Made once for a
// step, read by all of its layers. Plain C++: nothing here needs a device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "ops/ops.h"

namespace aegaeon::ops::cuda {

// Where a row's keys and values go. block < 0: the row belongs to no sequence.
struct RowPlace {
  std::int32_t block;
  std::int32_t offset;  // the token within the block
};

// Some queries of one sequence and any KV head: those from `first_query` on, in the order [row]
// [head of the group], as many as a tile has. rows == 0: nothing to do.
struct AttendTile {
  std::int32_t first_row;
  std::int32_t rows;
  std::int32_t start;
  std::int32_t first_block;  // of the sequence, among all blocks' ids
  std::int32_t first_query;
  std::int32_t first_partial;  // queries of short tiles before this one
};

// A block of threads computes one split of a short tile, or all splits of a long one.
constexpr std::size_t kShortQueries = 16, kLongQueries = 64;
// Sequences with at most so many queries for each KV head are cut into short tiles: they are too
// few blocks otherwise. Which it is never shows in the bits.
constexpr std::size_t kMostShortQueries = 64;
// As on the CPU: tokens whose softmax is one, whoever computes it.
constexpr std::size_t kSplitTokens = 512;

// How much of each there is: launches are as large, so a captured step serves all passes that fit.
struct StepBounds {
  std::size_t rows = 0;
  std::size_t short_tiles = 0;
  std::size_t short_queries = 0;  // of all short tiles, for one KV head
  std::size_t splits = 0;         // of the longest short tile
  std::size_t long_tiles = 0;
};

class StepTables {
 public:
  // Of `heads` query heads. At least `least` of everything is there, what is more than needed does
  // nothing. Sequences that would have splits of short tiles take more than `most_floats` of a
  // workspace are cut into long ones, which take none. Throws std::out_of_range for a block whose
  // id has no 32 bits.
  StepTables(const PagedKv& kv, std::size_t heads, const StepBounds& least = {},
             std::size_t most_floats = std::numeric_limits<std::size_t>::max());

  const StepBounds& bounds() const { return bounds_; }
  // RowPlace [rows], AttendTile [short_tiles], AttendTile [long_tiles], block ids: that order.
  const std::vector<std::int32_t>& words() const { return words_; }

 private:
  // `queries` are those of one KV head.
  void add_tiles(const SequenceRows& sequence, std::size_t queries, std::size_t first_block,
                 bool is_short);
  bool is_short(const PagedKv& kv, const SequenceRows& sequence, std::size_t queries,
                std::size_t most_floats) const;

  StepBounds bounds_;
  std::size_t short_queries_ = 0;  // so far
  std::vector<AttendTile> short_, long_;
  std::vector<std::int32_t> words_;
};

// The tables on a device, and memory there for splits: `workspace_floats`, of nobody else while a
// step runs.
struct DeviceTables {
  const std::int32_t* words;
  StepBounds bounds;
  float* workspace;

  const RowPlace* places() const { return reinterpret_cast<const RowPlace*>(words); }
  const AttendTile* short_tiles() const {
    return reinterpret_cast<const AttendTile*>(places() + bounds.rows);
  }
  const AttendTile* long_tiles() const { return short_tiles() + bounds.short_tiles; }
  const std::int32_t* blocks() const {
    return reinterpret_cast<const std::int32_t*>(long_tiles() + bounds.long_tiles);
  }
};

std::size_t workspace_floats(const StepBounds& bounds, const PagedKv& kv);

}  // namespace aegaeon::ops::cuda

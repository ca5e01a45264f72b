#include "ops/cuda/tables.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace aegaeon::ops::cuda {
namespace {

std::int32_t narrow_id(std::size_t id) {
  if (id > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
    throw std::out_of_range(std::to_string(id) +
                            " has no 32 bits: the KV arena has too many pages");
  }
  return static_cast<std::int32_t>(id);
}

std::size_t splits_of(const SequenceRows& sequence) {
  return (sequence.start + sequence.rows + kSplitTokens - 1) / kSplitTokens;
}

template <typename Entry>
void put(std::vector<std::int32_t>& words, const std::vector<Entry>& entries) {
  const std::size_t at = words.size();
  words.resize(at + entries.size() * sizeof(Entry) / sizeof(std::int32_t));
  if (!entries.empty()) std::memcpy(&words[at], entries.data(), entries.size() * sizeof(Entry));
}

}  // namespace

StepTables::StepTables(const PagedKv& kv, std::size_t heads, const StepBounds& least,
                       std::size_t most_floats)
    : bounds_(least) {
  std::vector<std::int32_t> blocks;
  for (const SequenceRows& sequence : kv.sequences) {
    if (sequence.rows == 0) continue;
    bounds_.rows = std::max(bounds_.rows, sequence.first_row + sequence.rows);
    const std::size_t queries = sequence.rows * (heads / kv.kv_heads);
    add_tiles(sequence, queries, blocks.size(), is_short(kv, sequence, queries, most_floats));
    for (const std::size_t block : sequence.blocks) blocks.push_back(narrow_id(block));
  }
  std::vector<RowPlace> places(bounds_.rows, RowPlace{-1, 0});
  for (const SequenceRows& sequence : kv.sequences) {
    for (std::size_t at = 0; at < sequence.rows; ++at) {
      const std::size_t position = sequence.start + at;
      places[sequence.first_row + at] = {narrow_id(sequence.blocks[position / kBlockTokens]),
                                         narrow_id(position % kBlockTokens)};
    }
  }
  bounds_.short_queries = std::max(bounds_.short_queries, short_queries_);
  bounds_.short_tiles = std::max(bounds_.short_tiles, short_.size());
  bounds_.long_tiles = std::max(bounds_.long_tiles, long_.size());
  short_.resize(bounds_.short_tiles, AttendTile{});
  long_.resize(bounds_.long_tiles, AttendTile{});
  put(words_, places);
  put(words_, short_);
  put(words_, long_);
  put(words_, blocks);
}

bool StepTables::is_short(const PagedKv& kv, const SequenceRows& sequence, std::size_t queries,
                          std::size_t most_floats) const {
  if (queries > kMostShortQueries) return false;
  StepBounds with = bounds_;
  with.short_queries = std::max(with.short_queries, short_queries_ + queries);
  with.splits = std::max(with.splits, splits_of(sequence));
  return cuda::workspace_floats(with, kv) <= most_floats;
}

void StepTables::add_tiles(const SequenceRows& sequence, std::size_t queries,
                           std::size_t first_block, bool is_short) {
  const std::size_t each = is_short ? kShortQueries : kLongQueries;
  for (std::size_t query = 0; query < queries; query += each) {
    (is_short ? short_ : long_)
        .push_back({narrow_id(sequence.first_row), narrow_id(sequence.rows),
                    narrow_id(sequence.start), narrow_id(first_block), narrow_id(query),
                    narrow_id(short_queries_ + query)});
  }
  if (!is_short) return;
  short_queries_ += queries;
  bounds_.splits = std::max(bounds_.splits, splits_of(sequence));
}

std::size_t workspace_floats(const StepBounds& bounds, const PagedKv& kv) {
  if (bounds.splits <= 1) return 0;
  return kv.kv_heads * bounds.short_queries * bounds.splits * (kv.head_dim + 2);
}

}  // namespace aegaeon::ops::cuda

// What rests in a pool, by what it holds, for all its clients to find.
//
// An entry says under which word a block rests that holds what the key names. It is a hint: no two
// rests have the same word, so the block's own word says whether that is still so, and whoever
// wakes it by compare-and-swap has the content or a refusal. So entries need no lock, and none is
// ever taken out: one that says nothing true any more is written over.
//
// A set of eight entries belongs to a key. Writers may meet in one, or die in the middle; an entry
// whose check does not fit its words is none. What is lost so is prefilled again.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "memory/kv_words.h"

namespace aegaeon::memory {

// A good hash of a block's content and of all that it depends on.
struct KvKey {
  std::uint64_t high;
  std::uint64_t low;

  friend bool operator==(const KvKey& a, const KvKey& b) {
    return a.high == b.high && a.low == b.low;
  }
};

struct KvEntry {
  KvKey key;
  std::uint64_t id;
  unsigned shape;
  KvIdentity word;
};

class KvIndexSlot {
 public:
  // nullopt where nothing was written, or something by halves.
  std::optional<KvEntry> read() const;
  void write(const KvEntry& entry);

 private:
  std::atomic<std::uint64_t> high_, low_, place_, word_, check_;
};

constexpr std::size_t kIndexWays = 8;
using KvIndexSet = std::array<KvIndexSlot, kIndexWays>;

class KvIndex {
 public:
  KvIndex(KvIndexSet* sets, std::size_t count) : sets_(sets), count_(count) {}

  // Sets enough for so many blocks, within bounds.
  static std::size_t sets_for(std::size_t blocks);

  KvIndexSet& set_of(const KvKey& key) const { return sets_[key.low % count_]; }

 private:
  KvIndexSet* sets_;
  std::size_t count_;
};

}  // namespace aegaeon::memory

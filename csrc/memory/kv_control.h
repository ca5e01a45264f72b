// The control region of a KV pool: what lies where in it, each access checked against damage.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "memory/kv_geometry.h"
#include "memory/kv_index.h"
#include "memory/kv_words.h"
#include "shm/lock.h"
#include "shm/owner.h"

namespace aegaeon::memory {

struct KvClient {
  std::atomic<shm::Owner> owner;  // 0: the slot is free
  std::atomic<std::uint64_t> generation;
};

// The beginning of the region; the words that a KvControl finds follow it.
struct KvControlHead {
  shm::OwnerLock lock;                     // over clients and the arena's making, and who reclaims
  std::atomic<std::uint64_t> arena_inode;  // 0: the file is not made yet
  std::atomic<std::uint64_t> rests;        // blocks laid to rest so far: when each was
  std::uint64_t shape_count;
  std::array<KvShapeRecord, kKvShapes> shapes;
  std::array<KvClient, kKvClients> clients;
};

struct KvSlab {
  std::atomic<std::uint64_t> state;      // a SlabState
  std::atomic<std::uint64_t> is_backed;  // 1 once memory was reserved for it
};

// A set of slabs in words of 64 bits. A hint: a bit too many is cleared by whoever finds it wrong,
// and one too few is set again when the dead are reclaimed.
class SlabSet {
 public:
  SlabSet(std::atomic<std::uint64_t>* words, std::size_t slabs) : words_(words), slabs_(slabs) {}

  void add(std::size_t slab) { words_[slab / 64].fetch_or(bit(slab)); }
  void remove(std::size_t slab) { words_[slab / 64].fetch_and(~bit(slab)); }
  bool holds(std::size_t slab) const { return (words_[slab / 64].load() & bit(slab)) != 0; }

  // The first slab of the set from `from` on; the number of slabs when there is none.
  std::size_t next(std::size_t from) const {
    for (std::size_t word = from / 64; word * 64 < slabs_; ++word, from = word * 64) {
      const std::uint64_t bits = words_[word].load() >> from % 64;
      if (bits != 0) {
        const std::size_t found = from + static_cast<std::size_t>(__builtin_ctzll(bits));
        return found < slabs_ ? found : slabs_;
      }
    }
    return slabs_;
  }

 private:
  static std::uint64_t bit(std::size_t slab) { return std::uint64_t{1} << slab % 64; }

  std::atomic<std::uint64_t>* words_;
  std::size_t slabs_;
};

class KvControl {
 public:
  // Over `body`, which initialise() has filled for a geometry like this one.
  KvControl(std::byte* body, const KvGeometry& geometry, std::string name);

  static std::size_t bytes_for(const KvGeometry& geometry);
  static void initialise(std::byte* body, const KvGeometry& geometry);
  // Raises RegionMismatch, naming the difference, when `body` was made for another geometry.
  static void check(const std::byte* body, std::size_t bytes, const KvGeometry& geometry,
                    const std::string& name);

  KvControlHead& head() const { return *head_; }
  SlabState state(std::size_t slab) const;
  std::atomic<std::uint64_t>& state_word(std::size_t slab) const { return slabs_[slab].state; }
  std::atomic<std::uint64_t>& is_backed(std::size_t slab) const { return slabs_[slab].is_backed; }
  // Of all blocks that the slab could have, whatever it is bound to.
  std::atomic<KvIdentity>* owners(std::size_t slab) const { return owners_ + slab * most_blocks_; }
  std::size_t most_blocks() const { return most_blocks_; }
  bool is_all_free(std::size_t slab) const;
  const KvIndex& index() const { return index_; }

  SlabSet free_slabs() const { return {hints_, slab_count_}; }
  // Slabs bound to `shape` that may have a free block.
  SlabSet slabs_with_room(unsigned shape) const {
    return {hints_ + (1 + shape) * hint_words_, slab_count_};
  }

  const std::string& name() const { return name_; }
  [[noreturn]] void damaged(const char* what) const;

 private:
  std::string name_;
  std::size_t slab_count_;
  std::size_t shape_count_;
  std::size_t most_blocks_;
  std::size_t hint_words_;
  KvControlHead* head_;
  std::atomic<std::uint64_t>* hints_;
  KvSlab* slabs_;
  std::atomic<KvIdentity>* owners_;
  KvIndex index_;
};

}  // namespace aegaeon::memory

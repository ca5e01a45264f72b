// Blocks of keys and values in one arena, for all processes of a node, handed on without a copy.
//
// An arena is cut into slabs; a slab is bound to one block shape at a time. Each block has an owner
// word in the control region, and that word alone says who holds it: a block is given, freed or
// handed on by one compare-and-swap, so a process may die between any two instructions and each
// block is still either free or somebody's. Nothing counts blocks in shared memory, for a count
// and the words could disagree after a death. Any client allocates in any slab of its shape.
//
// Binding. A slab whose blocks are all free goes back to the common list: bound -> draining, look
// at all its words, -> free, or -> bound again when one is held. An allocator sets a word, then
// looks whether the slab is still bound. These are seq_cst, so either the drainer sees the word or
// the allocator sees that the slab is draining, and takes its word back. Hence: a word held, and
// the slab seen bound after that, pins the binding. A word that was set too late is harmless: it
// stands for no bytes, and whoever set it, or reclaims for the dead, clears it.
//
// Hand-off. A receiver swaps each word from the sender's identity to its own, pending, and only
// once it has all of them settles them; if one is missing it puts the others back. A sender that
// frees meanwhile waits for that decision, so that no block is put back into hands that have let
// go. An identity may carry an offer number, good for one hand-off: see offer().
//
// The dead. A word whose client is not alive is reclaimed: taken over by compare-and-swap, its
// block zeroed (a NaN of a half-done step would reach the next reader through masked keys), freed.
//
// Rest. A block may hold what somebody would like to find again, but needs not: it rests. It
// counts as free and against nobody's quota; whoever lacks room, in whatever process, evicts those
// that have rested longest, by one compare-and-swap that makes them free. Any client wakes it by
// another, from the very word that it rests under: so it has either its content or a refusal. What
// it holds is told to all clients through an index: see kv_index.h.
//
// Quota. Each client counts for itself what it was given and what it freed. What others have taken
// from it is found by looking, when the count says that there is no room.
//
// What is read from shared memory is checked on each use: damage raises RegionMismatch.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "memory/kv_arena.h"
#include "memory/kv_control.h"
#include "memory/kv_geometry.h"
#include "shm/owner.h"
#include "shm/region.h"

namespace aegaeon::memory {

enum class Given {
  all,
  needs_slab,  // for a quick call only: try again with Effort::full
  no_room,     // no slab is free
  no_memory,   // a slab is free, and the file system has no memory for it
  over_quota,
};

enum class Taken { all, gone, over_quota };

// A block that rests, by the word to wake it; by none where there is none.
struct KvFound {
  std::uint64_t id;
  KvIdentity word;
};

enum class Effort {
  quick,  // some hundred nanoseconds: only what lies in bound slabs
  full,   // may bind slabs and reclaim: milliseconds
};

class KvPool {
 public:
  // One client over private memory: its own, or the caller's zeroed bytes at `base`, which with
  // `device` are that one's.
  static std::unique_ptr<KvPool> open_private(const KvGeometry& geometry, std::uint64_t quota_bytes,
                                              void* base,
                                              std::shared_ptr<DeviceBytes> device = nullptr);
  // Registers a client of the pool at `path`, with its arena at `path`+arena; makes both if there
  // are none. Raises RegionError (64 clients live, no room), RegionMismatch (other sizes, damage).
  static std::unique_ptr<KvPool> open_shared(const std::string& path, const KvGeometry& geometry,
                                             std::uint64_t quota_bytes);

  KvPool(const KvPool&) = delete;
  KvPool& operator=(const KvPool&) = delete;
  ~KvPool();

  // All verbs: any thread of the process that opened the pool (RegionError elsewhere). `ids` are
  // first pages of blocks of shape number `shape`; those of no block raise std::invalid_argument.

  // Fills `ids` with `count` blocks, or gives none.
  Given allocate(unsigned shape, std::size_t count, std::uint64_t* ids, Effort effort);
  // Frees those that are ours, whoever allocated them; with `offer` (else 0) only those that still
  // lie under it. `is_poisoned` zeroes them first.
  void free(unsigned shape, const std::vector<std::uint64_t>& ids, bool is_poisoned,
            KvIdentity offer);
  // Returns an identity by which these blocks, ours, may be taken once; nullopt when one is not
  // ours any more. A later offer of a block, or its being freed, makes the earlier one void.
  std::optional<KvIdentity> offer(unsigned shape, const std::vector<std::uint64_t>& ids);
  // Makes all of these ours if all are `sender`'s, else none.
  Taken take(unsigned shape, const std::vector<std::uint64_t>& ids, KvIdentity sender);
  // Lays those that are ours to rest, as `free` would free them; the later in `ids`, the longer
  // they stay. Returns the word to wake each by, 0 for those that are not ours.
  std::vector<KvIdentity> rest(unsigned shape, const std::vector<std::uint64_t>& ids,
                               KvIdentity offer);
  // Makes the first of these ours, up to one that was evicted or that there is no quota for;
  // returns how many. `words`, one each, are those that `rest` gave, to us or to another client.
  std::size_t wake(unsigned shape, const std::vector<std::uint64_t>& ids,
                   const std::vector<KvIdentity>& words);
  // Which of them rest still.
  std::vector<bool> still_rest(unsigned shape, const std::vector<std::uint64_t>& ids,
                               const std::vector<KvIdentity>& words) const;
  // Lets all clients find these, which rest under `words` (0: it does not), by `keys`. Others that
  // rest by the same key are freed.
  void tell(unsigned shape, const std::vector<KvKey>& keys, const std::vector<std::uint64_t>& ids,
            const std::vector<KvIdentity>& words);
  // Returns for each key what rests by it, whoever told of it.
  std::vector<KvFound> look_up(unsigned shape, const std::vector<KvKey>& keys) const;
  // How many resting blocks, of whomever, made room for this client.
  std::uint64_t evicted() const { return evicted_.load(); }
  // Gets memory for one more free slab, whoever may use it, unless free slabs of `ahead_bytes` have
  // some: so that nobody has to wait for it. False: they have, or no slab is free. Throws
  // OutOfBlocks when the memory is not there.
  bool back_next(std::uint64_t ahead_bytes);
  // Frees what the dead hold; returns how many blocks that were.
  std::size_t reclaim();
  // Frees all we hold and leaves; idempotent. The memory stays mapped while this object lives.
  void close();

  // Blocks of `shape` that could be allocated now, and bytes that we hold, without what rests:
  // found by looking at all words, microseconds per GB.
  std::size_t free_blocks(unsigned shape) const;
  std::uint64_t used_bytes() const;
  // Bytes that count against our quota: those that we hold, and for a while those that others have
  // taken, until we let go of their offer.
  std::uint64_t charged_bytes() const { return charged_bytes_.load(); }

  KvIdentity identity() const { return identity_; }
  std::uint64_t quota_bytes() const { return quota_bytes_; }
  const KvGeometry& geometry() const { return geometry_; }
  const KvArena& arena() const { return arena_; }

 private:
  struct Body {
    std::optional<shm::Region> region;
    std::unique_ptr<std::uint64_t[]> words;  // where there is no region

    std::byte* bytes() const;
  };
  // Which clients live, as seen under the lock: identities, 0 where nobody does.
  using Living = std::array<KvIdentity, kKvClients>;
  enum class Orphan { freed, changed_hands, stays };
  class Patience;
  class Verb;

  KvPool(Body body, KvArena arena, const KvGeometry& geometry, std::uint64_t quota_bytes);

  // kv_pool.cpp: clients
  static Body open_region(const std::string& path, const KvGeometry& geometry);
  static KvArena open_arena(const std::string& path, KvControl& control,
                            const KvGeometry& geometry);
  void enter();
  bool try_reclaim();
  void check_usable() const;
  bool charge(std::uint64_t bytes);
  bool recount();

  // kv_slabs.cpp: slabs change their use, and are looked through
  std::size_t bind(unsigned shape, bool& is_memory_short);
  bool prepare(std::size_t slab, const SlabState& before, unsigned shape);
  std::size_t find_bindable(unsigned shape, bool is_memory_short);
  void give_back_if_free(std::size_t slab);
  void after_freeing(std::size_t slab);
  void note_full(std::size_t slab, unsigned shape);
  bool is_any_draining() const;

  // kv_blocks.cpp: blocks change hands
  std::size_t claim_bound(unsigned shape, std::size_t want, std::uint64_t* ids);
  std::size_t claim_more(unsigned shape, std::size_t want, std::uint64_t* ids, std::size_t got,
                         bool& is_memory_short);
  std::size_t claim_in(std::size_t slab, unsigned shape, std::size_t want, std::uint64_t* ids);
  void unclaim(unsigned shape, const std::uint64_t* ids, std::size_t count);
  std::size_t free_blocks_of(unsigned shape, const std::vector<std::uint64_t>& ids,
                             bool is_poisoned, KvIdentity offer);
  KvIdentity rest_block(const BlockPlace& place, unsigned shape, KvIdentity offer,
                        Patience& patience);
  bool free_block(const BlockPlace& place, unsigned shape, bool is_poisoned, KvIdentity offer,
                  Patience& patience);
  KvIdentity settled_owner(const BlockPlace& place, Patience& patience) const;
  bool take_block(const BlockPlace& place, unsigned shape, KvIdentity sender);

  // kv_rest.cpp: what makes room when it is wanted
  struct Resting;
  std::size_t evict(unsigned shape, std::size_t want);
  void find_resting(std::size_t slab, unsigned shape, std::uint64_t now,
                    std::vector<Resting>& found) const;
  std::size_t evict_in(const Resting& victim);
  bool is_bindable(std::size_t slab) const;

  // kv_index.cpp: what rests is found by others
  void tell_one(const KvEntry& entry, std::uint64_t now);
  bool rests_still(const KvEntry& entry) const;
  void let_go(const KvEntry& entry);

  // kv_reclaim.cpp: the dead, under the lock
  Living find_living() const;
  void finish_for_dead(const Living& living, unsigned actor);
  std::size_t free_orphans(const Living& living, Living& unfinished);
  Orphan free_orphan(std::size_t slab, std::size_t index, KvIdentity dead);
  void restore_hints();
  std::size_t reclaim_locked();

  bool is_ours(KvIdentity owner) const { return client_of(owner) == identity_; }
  bool is_held_by_us(KvIdentity owner) const { return is_ours(owner) && !is_resting(owner); }

  Body body_;
  KvArena arena_;
  KvGeometry geometry_;
  KvControl control_;
  std::uint64_t quota_bytes_;
  shm::Owner self_ = shm::kNobody;
  unsigned slot_ = 0;
  KvIdentity identity_ = 0;
  std::atomic<bool> is_closed_{false};
  std::atomic<std::uint64_t> charged_bytes_{0};  // never less than what we hold
  std::atomic<std::uint64_t> verbs_begun_{0};
  std::atomic<std::uint64_t> verbs_ended_{0};
  std::atomic<std::uint32_t> next_offer_{0};
  std::atomic<std::uint64_t> evicted_{0};
};

}  // namespace aegaeon::memory

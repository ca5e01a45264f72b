// The two words that KV ownership consists of: who holds a block, and what a slab is used for.
#pragma once

#include <cstdint>

namespace aegaeon::memory {

constexpr unsigned kKvClients = 64;
constexpr unsigned kKvShapes = 256;

// Who holds a block: client slot (6 bits), the slot's generation (26), offer number (32). 0 is
// nobody; generations begin at 1. A client is a process that has opened the pool, or its heir: the
// generation tells the two apart.
using KvIdentity = std::uint64_t;

constexpr KvIdentity kFreeBlock = 0;
constexpr std::uint64_t kGenerationMask = (std::uint64_t{1} << 26) - 1;
constexpr unsigned kOfferShift = 32;
// Offer numbers that nobody may take by: from here on those of resting blocks, of which the number
// tells when they were laid to rest; a take has begun and is not decided; the block is being
// zeroed.
constexpr std::uint64_t kFirstRest = 0xf0000000;
constexpr std::uint64_t kPendingOffer = 0xffffffff;
constexpr std::uint64_t kHeldOffer = 0xfffffffe;

constexpr KvIdentity make_identity(unsigned slot, std::uint64_t generation) {
  return (generation & kGenerationMask) << 6 | slot;
}
constexpr unsigned slot_of(KvIdentity identity) { return identity & (kKvClients - 1); }
constexpr std::uint64_t offer_of(KvIdentity identity) { return identity >> kOfferShift; }
constexpr KvIdentity client_of(KvIdentity identity) { return identity & 0xffffffff; }
constexpr KvIdentity with_offer(KvIdentity identity, std::uint64_t offer) {
  return client_of(identity) | offer << kOfferShift;
}
constexpr bool is_reserved(KvIdentity identity) { return offer_of(identity) >= kFirstRest; }
constexpr bool is_resting(KvIdentity identity) {
  return is_reserved(identity) && offer_of(identity) < kHeldOffer;
}
// The numbers of resting words; later they begin again, and what is oldest is guessed wrong once.
constexpr std::uint64_t kRests = kHeldOffer - kFirstRest;
// How many blocks have been laid to rest since the one that rests under `word`: less than kRests.
constexpr std::uint64_t rest_age(KvIdentity word, std::uint64_t now) {
  return (now % kRests + kRests - (offer_of(word) - kFirstRest)) % kRests;
}

enum class SlabUse : unsigned {
  free,       // anybody's
  bound,      // cut into blocks of one shape
  draining,   // bound; the actor looks whether all its blocks are free
  preparing,  // the actor's, who is binding it
};

// One atomic word. `shape` is that of the blocks, or of a free slab's last ones; `version` moves
// with every change, so that no compare-and-swap takes one use for another.
struct SlabState {
  SlabUse use = SlabUse::free;
  bool is_dirty = false;  // free, and what lies in it may be anything
  unsigned shape = 0;
  unsigned actor = 0;  // client slot
  std::uint64_t version = 0;

  static SlabState unpack(std::uint64_t word) {
    return {static_cast<SlabUse>(word & 3), (word >> 2 & 1) != 0,
            static_cast<unsigned>(word >> 3 & 0xff), static_cast<unsigned>(word >> 11 & 0x3f),
            word >> 17};
  }
  std::uint64_t pack() const {
    return static_cast<std::uint64_t>(use) | std::uint64_t{is_dirty} << 2 |
           std::uint64_t{shape} << 3 | std::uint64_t{actor} << 11 | version << 17;
  }
  // What follows this state.
  SlabState next(SlabUse new_use, unsigned new_shape, unsigned new_actor) const {
    return {new_use, false, new_shape, new_actor, version + 1};
  }
  bool is_bound_to(unsigned wanted) const { return use == SlabUse::bound && shape == wanted; }
  // True while a held block keeps its meaning: whoever drains will find it and put things back.
  bool has_blocks_of(unsigned wanted) const {
    return (use == SlabUse::bound || use == SlabUse::draining) && shape == wanted;
  }
};

}  // namespace aegaeon::memory

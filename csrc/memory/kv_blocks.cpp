// Blocks change hands: allocated, freed, offered, taken.
#include <sched.h>

#include "memory/kv_pool.h"
#include "memory/kv_verb.h"
#include "shm/futex.h"

namespace aegaeon::memory {
namespace {

constexpr int kSpins = 1000;
// A slab that is being drained is bound or free again in well under a microsecond.
constexpr int kClaimRounds = 64;

// What was freed counts no more, however the call ends.
struct Refund {
  ~Refund() { charged.fetch_sub(bytes); }
  std::atomic<std::uint64_t>& charged;
  std::uint64_t bytes = 0;
};

}  // namespace

Given KvPool::allocate(unsigned shape, std::size_t count, std::uint64_t* ids, Effort effort) {
  const Verb verb(*this);
  const std::uint64_t block_bytes = geometry_.shapes[shape].block_bytes;
  if (count > quota_bytes_ / block_bytes || !charge(count * block_bytes)) {
    return Given::over_quota;
  }
  bool is_memory_short = false;
  std::size_t got = claim_bound(shape, count, ids);
  if (got < count && effort == Effort::full) {
    got = claim_more(shape, count, ids, got, is_memory_short);
  }
  if (got == count) {
    return Given::all;
  }
  unclaim(shape, ids, got);
  charged_bytes_.fetch_sub(count * block_bytes);
  if (effort == Effort::quick) {
    return Given::needs_slab;
  }
  return is_memory_short ? Given::no_memory : Given::no_room;
}

// From slabs that are bound already, the lowest first: they fill up and the high ones drain.
std::size_t KvPool::claim_bound(unsigned shape, std::size_t want, std::uint64_t* ids) {
  const SlabSet with_room = control_.slabs_with_room(shape);
  std::size_t got = 0;
  for (std::size_t slab = with_room.next(0); got < want && slab < geometry_.slab_count;
       slab = with_room.next(slab + 1)) {
    got += claim_in(slab, shape, want - got, ids + got);
  }
  return got;
}

// Binds slabs, then evicts what rests, then reclaims, then looks again while slabs are between two
// uses. Returns how many of `want` it has, `got` of which it had.
std::size_t KvPool::claim_more(unsigned shape, std::size_t want, std::uint64_t* ids,
                               std::size_t got, bool& is_memory_short) {
  bool may_change = true;
  for (int round = 0; got < want && may_change && round < kClaimRounds; ++round) {
    while (got < want) {
      const std::size_t slab = bind(shape, is_memory_short);
      if (slab == geometry_.slab_count) break;
      got += claim_in(slab, shape, want - got, ids + got);
    }
    if (got < want) {
      may_change =
          evict(shape, want - got) > 0 || (round == 0 && try_reclaim()) || is_any_draining();
      got += claim_bound(shape, want - got, ids + got);
    }
  }
  return got;
}

std::size_t KvPool::claim_in(std::size_t slab, unsigned shape, std::size_t want,
                             std::uint64_t* ids) {
  const std::size_t blocks = geometry_.blocks_of(shape);
  if (!control_.state(slab).is_bound_to(shape)) {
    note_full(slab, shape);
    return 0;
  }
  if (control_.is_backed(slab).load() == 0) {
    control_.damaged("a bound slab has no memory");
  }
  std::atomic<KvIdentity>* owners = control_.owners(slab);
  std::size_t got = 0;
  std::size_t index = 0;
  for (; index < blocks && got < want; ++index) {
    KvIdentity nobody = kFreeBlock;
    if (owners[index].load(std::memory_order_relaxed) == kFreeBlock &&
        owners[index].compare_exchange_strong(nobody, identity_)) {
      ids[got++] = geometry_.id_of(geometry_.place_of(slab, index, shape), shape);
    }
  }
  if (index == blocks) {
    note_full(slab, shape);
  }
  if (got > 0 && !control_.state(slab).is_bound_to(shape)) {
    unclaim(shape, ids, got);
    return 0;
  }
  return got;
}

void KvPool::unclaim(unsigned shape, const std::uint64_t* ids, std::size_t count) {
  for (std::size_t at = 0; at < count; ++at) {
    const BlockPlace place = geometry_.find(shape, ids[at]);
    KvIdentity owner = identity_;
    if (control_.owners(place.slab)[place.index].compare_exchange_strong(owner, kFreeBlock)) {
      after_freeing(place.slab);
    }
  }
}

void KvPool::free(unsigned shape, const std::vector<std::uint64_t>& ids, bool is_poisoned,
                  KvIdentity offer) {
  const Verb verb(*this);
  if (free_blocks_of(shape, ids, is_poisoned, offer) < ids.size() && offer != 0) {
    recount();  // others have taken them
  }
}

// Returns how many were ours.
std::size_t KvPool::free_blocks_of(unsigned shape, const std::vector<std::uint64_t>& ids,
                                   bool is_poisoned, KvIdentity offer) {
  Refund refund{charged_bytes_};
  Patience patience;
  std::size_t count = 0;
  std::size_t last_slab = geometry_.slab_count;
  for (const std::uint64_t id : ids) {
    const BlockPlace place = geometry_.find(shape, id);
    if (last_slab != place.slab && last_slab != geometry_.slab_count) {
      after_freeing(last_slab);
    }
    last_slab = place.slab;
    if (free_block(place, shape, is_poisoned, offer, patience)) {
      refund.bytes += geometry_.shapes[shape].block_bytes;
      ++count;
    }
  }
  if (last_slab != geometry_.slab_count) {
    after_freeing(last_slab);
  }
  return count;
}

// False when it is not ours, or not under the offer.
bool KvPool::free_block(const BlockPlace& place, unsigned shape, bool is_poisoned, KvIdentity offer,
                        Patience& patience) {
  std::atomic<KvIdentity>& word = control_.owners(place.slab)[place.index];
  while (true) {
    KvIdentity owner = settled_owner(place, patience);
    if (!is_ours(owner) || is_reserved(owner) || (offer != 0 && owner != offer) ||
        !control_.state(place.slab).has_blocks_of(shape)) {
      return false;
    }
    if (!is_poisoned) {
      if (word.compare_exchange_strong(owner, kFreeBlock)) return true;
      continue;
    }
    // Nobody may take it from here on: it would be zeroed under them.
    if (word.compare_exchange_strong(owner, with_offer(identity_, kHeldOffer))) {
      arena_.zero(place.offset, geometry_.shapes[shape].block_bytes);
      word.store(kFreeBlock);
      return true;
    }
  }
}

// Who holds a block, once a receiver that has begun to take it has decided or died.
KvIdentity KvPool::settled_owner(const BlockPlace& place, Patience& patience) const {
  const std::atomic<KvIdentity>& word = control_.owners(place.slab)[place.index];
  KvIdentity owner = word.load();
  for (int spin = 1; offer_of(owner) == kPendingOffer; ++spin) {
    shm::relax();
    if (spin % kSpins == 0) {
      const KvClient& taker = control_.head().clients[slot_of(owner)];
      if (patience.is_over() || !shm::owner_is_alive(taker.owner.load())) break;
      sched_yield();
    }
    owner = word.load();
  }
  return owner;
}

std::optional<KvIdentity> KvPool::offer(unsigned shape, const std::vector<std::uint64_t>& ids) {
  const Verb verb(*this);
  const std::uint64_t number = 1 + next_offer_.fetch_add(1) % (kFirstRest - 1);
  const KvIdentity offered = with_offer(identity_, number);
  Patience patience;
  for (const std::uint64_t id : ids) {
    const BlockPlace place = geometry_.find(shape, id);
    std::atomic<KvIdentity>& word = control_.owners(place.slab)[place.index];
    KvIdentity owner = settled_owner(place, patience);
    do {
      if (!is_ours(owner) || is_reserved(owner) ||
          !control_.state(place.slab).has_blocks_of(shape)) {
        return std::nullopt;
      }
    } while (!word.compare_exchange_weak(owner, offered));
  }
  return offered;
}

Taken KvPool::take(unsigned shape, const std::vector<std::uint64_t>& ids, KvIdentity sender) {
  const Verb verb(*this);
  const std::uint64_t block_bytes = geometry_.shapes[shape].block_bytes;
  std::vector<BlockPlace> places;
  for (const std::uint64_t id : ids) {
    places.push_back(geometry_.find(shape, id));
  }
  if (sender == kFreeBlock || is_reserved(sender)) {
    return Taken::gone;
  }
  // Blocks of our own are charged already.
  const std::uint64_t bytes = is_ours(sender) ? 0 : ids.size() * block_bytes;
  if (!charge(bytes)) {
    return Taken::over_quota;
  }
  const KvIdentity pending = with_offer(identity_, kPendingOffer);
  std::size_t taken = 0;
  while (taken < places.size() && take_block(places[taken], shape, sender)) {
    ++taken;
  }
  const bool has_all = taken == places.size();
  for (std::size_t at = 0; at < taken; ++at) {
    KvIdentity owner = pending;
    control_.owners(places[at].slab)[places[at].index].compare_exchange_strong(
        owner, has_all ? identity_ : sender);
  }
  if (has_all) {
    return Taken::all;
  }
  charged_bytes_.fetch_sub(bytes);
  return Taken::gone;
}

// Makes the block ours, pending, if it is a block of `shape` and the sender's.
bool KvPool::take_block(const BlockPlace& place, unsigned shape, KvIdentity sender) {
  std::atomic<KvIdentity>& word = control_.owners(place.slab)[place.index];
  KvIdentity owner = sender;
  const KvIdentity pending = with_offer(identity_, kPendingOffer);
  if (!control_.state(place.slab).has_blocks_of(shape) ||
      !word.compare_exchange_strong(owner, pending)) {
    return false;
  }
  SlabState state = control_.state(place.slab);
  for (int spin = 0; state.use == SlabUse::draining && spin < kSpins; ++spin) {
    shm::relax();
    state = control_.state(place.slab);
  }
  if (state.is_bound_to(shape)) {
    return true;
  }
  owner = pending;
  word.compare_exchange_strong(owner, sender);
  return false;
}

}  // namespace aegaeon::memory

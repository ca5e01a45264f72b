// What the dead leave: slabs between two uses, and blocks that nobody will free. Under the lock.
#include "memory/kv_pool.h"
#include "shm/futex.h"

namespace aegaeon::memory {
namespace {

constexpr int kSpins = 10'000;

}  // namespace

KvPool::Living KvPool::find_living() const {
  Living living{};
  for (unsigned slot = 0; slot < kKvClients; ++slot) {
    const KvClient& client = control_.head().clients[slot];
    const shm::Owner owner = client.owner.load();
    if (owner != shm::kNobody && (owner == self_ || shm::owner_is_alive(owner))) {
      living[slot] = make_identity(slot, client.generation.load());
    }
  }
  return living;
}

std::size_t KvPool::reclaim_locked() {
  const Living living = find_living();
  finish_for_dead(living, slot_);
  Living unfinished{};
  const std::size_t count = free_orphans(living, unfinished);
  bool has_died = false;
  for (unsigned slot = 0; slot < kKvClients; ++slot) {
    std::atomic<shm::Owner>& owner = control_.head().clients[slot].owner;
    if (living[slot] == 0 && owner.load() != shm::kNobody) {
      has_died = true;
      if (unfinished[slot] == 0) owner.store(shm::kNobody);
    }
  }
  if (has_died || count > 0) {
    restore_hints();
  }
  return count;
}

// Puts slabs that a dead client was binding or draining into a use again.
void KvPool::finish_for_dead(const Living& living, unsigned actor) {
  for (std::size_t slab = 0; slab < geometry_.slab_count; ++slab) {
    const SlabState state = control_.state(slab);
    std::uint64_t expected = state.pack();
    const bool is_between = state.use == SlabUse::draining || state.use == SlabUse::preparing;
    if (!is_between || living[state.actor] != 0) {
      continue;
    }
    if (state.use == SlabUse::preparing) {
      // Not zeroed, or half.
      SlabState dirty = state.next(SlabUse::free, state.shape, actor);
      dirty.is_dirty = true;
      control_.state_word(slab).compare_exchange_strong(expected, dirty.pack());
      control_.free_slabs().add(slab);
    } else {
      const SlabState bound = state.next(SlabUse::bound, state.shape, actor);
      control_.state_word(slab).compare_exchange_strong(expected, bound.pack());
      after_freeing(slab);
    }
  }
}

// Frees the blocks whose client does not live; marks in `unfinished` the slots of those that could
// not be freed now.
std::size_t KvPool::free_orphans(const Living& living, Living& unfinished) {
  std::size_t count = 0;
  for (std::size_t slab = 0; slab < geometry_.slab_count; ++slab) {
    for (std::size_t index = 0; index < control_.most_blocks(); ++index) {
      const KvIdentity owner = control_.owners(slab)[index].load(std::memory_order_relaxed);
      if (owner == kFreeBlock || client_of(owner) == living[slot_of(owner)]) {
        continue;
      }
      const Orphan what = free_orphan(slab, index, owner);
      count += what == Orphan::freed;
      if (what == Orphan::stays) {
        unfinished[slot_of(owner)] = owner;
      }
    }
  }
  return count;
}

KvPool::Orphan KvPool::free_orphan(std::size_t slab, std::size_t index, KvIdentity dead) {
  std::atomic<KvIdentity>& word = control_.owners(slab)[index];
  const KvIdentity held = with_offer(identity_, kHeldOffer);
  KvIdentity owner = dead;
  if (!word.compare_exchange_strong(owner, held)) {
    return Orphan::changed_hands;
  }
  SlabState state = control_.state(slab);
  for (int spin = 0; state.use == SlabUse::draining && spin < kSpins; ++spin) {
    shm::relax();
    state = control_.state(slab);
  }
  if (state.use == SlabUse::draining) {
    // By a live process that stands still; what it decides must not be that this block was clean.
    owner = held;
    word.compare_exchange_strong(owner, dead);
    return Orphan::stays;
  }
  // Of a slab that is not bound it stands for no bytes. Else it pins what we have just seen. What
  // rested was whole.
  if (!is_resting(dead) && state.use == SlabUse::bound &&
      index < geometry_.blocks_of(state.shape)) {
    const BlockPlace place = geometry_.place_of(slab, index, state.shape);
    arena_.zero(place.offset, geometry_.shapes[state.shape].block_bytes);
  }
  owner = held;
  word.compare_exchange_strong(owner, kFreeBlock);
  after_freeing(slab);
  return Orphan::freed;
}

// One who died between freeing a block and saying so has left a hint unset, or a free slab bound.
void KvPool::restore_hints() {
  for (std::size_t slab = 0; slab < geometry_.slab_count; ++slab) {
    const SlabState state = control_.state(slab);
    if (state.use == SlabUse::free) {
      control_.free_slabs().add(slab);
    } else if (state.use == SlabUse::bound) {
      after_freeing(slab);
    }
  }
}

}  // namespace aegaeon::memory

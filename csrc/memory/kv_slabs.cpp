// Slabs change their use: bound for a shape, drained when all blocks are free; and are counted.
#include <algorithm>
#include <string>

#include "memory/kv_pool.h"
#include "shm/errors.h"

namespace aegaeon::memory {

// Binds a free slab to `shape`; returns the number of slabs when there is none.
std::size_t KvPool::bind(unsigned shape, bool& is_memory_short) {
  while (true) {
    const std::size_t slab = find_bindable(shape, is_memory_short);
    if (slab == geometry_.slab_count) {
      return slab;
    }
    const SlabState before = control_.state(slab);
    std::uint64_t expected = before.pack();
    const SlabState preparing = before.next(SlabUse::preparing, shape, slot_);
    if (before.use != SlabUse::free ||
        !control_.state_word(slab).compare_exchange_strong(expected, preparing.pack())) {
      continue;
    }
    control_.free_slabs().remove(slab);
    if (prepare(slab, before, shape)) {
      control_.state_word(slab).store(preparing.next(SlabUse::bound, shape, slot_).pack());
      control_.slabs_with_room(shape).add(slab);
      return slab;
    }
    SlabState as_before = preparing.next(SlabUse::free, before.shape, slot_);
    as_before.is_dirty = before.is_dirty;
    control_.state_word(slab).store(as_before.pack());
    control_.free_slabs().add(slab);
    is_memory_short = true;
  }
}

// The cheapest free slab: one that has memory and needs no zeroing, one that has memory, any.
// Among equals the lowest, so that the high ones stay free.
std::size_t KvPool::find_bindable(unsigned shape, bool is_memory_short) {
  const std::size_t none = geometry_.slab_count;
  SlabSet free_slabs = control_.free_slabs();
  std::size_t to_zero = none;
  std::size_t without_memory = none;
  for (std::size_t slab = free_slabs.next(0); slab < none; slab = free_slabs.next(slab + 1)) {
    const SlabState state = control_.state(slab);
    if (state.use != SlabUse::free) {
      free_slabs.remove(slab);
      if (control_.state(slab).use == SlabUse::free) free_slabs.add(slab);
    } else if (control_.is_backed(slab).load() == 0) {
      without_memory = std::min(without_memory, slab);
    } else if (!state.is_dirty &&
               geometry_.shapes[state.shape].encoding == geometry_.shapes[shape].encoding) {
      return slab;
    } else {
      to_zero = std::min(to_zero, slab);
    }
  }
  return to_zero < none || is_memory_short ? to_zero : without_memory;
}

// Sees that the slab has memory, and that every element in it is a finite number of the encoding.
bool KvPool::prepare(std::size_t slab, const SlabState& before, unsigned shape) {
  const std::size_t bytes = geometry_.slab_bytes;
  if (control_.is_backed(slab).load() == 0) {
    if (!arena_.reserve(slab * bytes, bytes)) {
      return false;
    }
    control_.is_backed(slab).store(1);
  } else if (before.is_dirty ||
             geometry_.shapes[before.shape].encoding != geometry_.shapes[shape].encoding) {
    arena_.zero(slab * bytes, bytes);
  }
  return true;
}

// Others need not know of it: a range may be reserved twice, and has nothing in it before it is.
bool KvPool::back_next(std::uint64_t ahead_bytes) {
  check_usable();
  const std::size_t none = geometry_.slab_count, bytes = geometry_.slab_bytes;
  std::uint64_t ahead = 0;
  std::size_t next = none;
  const SlabSet free_slabs = control_.free_slabs();
  for (std::size_t slab = free_slabs.next(0); slab < none; slab = free_slabs.next(slab + 1)) {
    const bool is_backed = control_.is_backed(slab).load() != 0;
    ahead += is_backed ? bytes : 0;
    next = is_backed ? next : std::min(next, slab);
  }
  if (ahead >= ahead_bytes || next == none) {
    return false;
  }
  if (!arena_.reserve(next * bytes, bytes)) {
    throw shm::OutOfBlocks("shared memory is full, and keys and values may want another " +
                           std::to_string(bytes) +
                           " bytes; free memory in /dev/shm or make it "
                           "larger (docker: --shm-size)");
  }
  arena_.populate(next * bytes, bytes);
  control_.is_backed(next).store(1);
  return true;
}

// Gives the slab to anybody when all its blocks are free. Of those who free its last blocks at the
// same time, one sees all of them free: each looks after it has freed, and after it has put the
// slab back for another's sake.
void KvPool::give_back_if_free(std::size_t slab) {
  while (true) {
    const SlabState state = control_.state(slab);
    if (state.use != SlabUse::bound || !control_.is_all_free(slab)) {
      return;
    }
    std::uint64_t expected = state.pack();
    const SlabState draining = state.next(SlabUse::draining, state.shape, slot_);
    if (!control_.state_word(slab).compare_exchange_strong(expected, draining.pack())) {
      continue;
    }
    const bool is_free = control_.is_all_free(slab);
    const SlabUse use = is_free ? SlabUse::free : SlabUse::bound;
    control_.state_word(slab).store(draining.next(use, state.shape, slot_).pack());
    if (is_free) {
      control_.free_slabs().add(slab);
      return;
    }
  }
}

// After a block of the slab was freed.
void KvPool::after_freeing(std::size_t slab) {
  SlabSet with_room = control_.slabs_with_room(control_.state(slab).shape);
  if (!with_room.holds(slab)) {
    with_room.add(slab);
  }
  give_back_if_free(slab);
}

// Takes the slab off the shape's list, where it was found full or bound to something else. Whoever
// frees a block adds it after freeing; so we look again after taking it off.
void KvPool::note_full(std::size_t slab, unsigned shape) {
  SlabSet with_room = control_.slabs_with_room(shape);
  with_room.remove(slab);
  if (!control_.state(slab).has_blocks_of(shape)) {
    return;
  }
  const std::atomic<KvIdentity>* owners = control_.owners(slab);
  for (std::size_t index = 0; index < geometry_.blocks_of(shape); ++index) {
    if (owners[index].load() == kFreeBlock) {
      with_room.add(slab);
      return;
    }
  }
}

bool KvPool::is_any_draining() const {
  for (std::size_t slab = 0; slab < geometry_.slab_count; ++slab) {
    if (control_.state(slab).use == SlabUse::draining) return true;
  }
  return false;
}

std::size_t KvPool::free_blocks(unsigned shape) const {
  check_usable();
  const std::size_t per_slab = geometry_.blocks_of(shape);
  std::size_t count = 0;
  for (std::size_t slab = 0; slab < geometry_.slab_count; ++slab) {
    const SlabState state = control_.state(slab);
    if (state.use == SlabUse::free) {
      count += per_slab;
    } else if (state.has_blocks_of(shape)) {
      const std::atomic<KvIdentity>* owners = control_.owners(slab);
      for (std::size_t index = 0; index < per_slab; ++index) {
        const KvIdentity owner = owners[index].load(std::memory_order_relaxed);
        count += owner == kFreeBlock || is_resting(owner);
      }
    } else if (state.use == SlabUse::bound && is_bindable(slab)) {
      count += per_slab;
    }
  }
  const std::uint64_t used = std::min(used_bytes(), quota_bytes_);
  return std::min(count, (quota_bytes_ - used) / geometry_.shapes[shape].block_bytes);
}

std::uint64_t KvPool::used_bytes() const {
  std::uint64_t bytes = 0;
  for (std::size_t slab = 0; slab < geometry_.slab_count; ++slab) {
    const std::atomic<KvIdentity>* owners = control_.owners(slab);
    const std::uint64_t block_bytes = geometry_.shapes[control_.state(slab).shape].block_bytes;
    for (std::size_t index = 0; index < control_.most_blocks(); ++index) {
      bytes += is_held_by_us(owners[index].load(std::memory_order_relaxed)) ? block_bytes : 0;
    }
  }
  return bytes;
}

}  // namespace aegaeon::memory

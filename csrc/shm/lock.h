// A lock word in shared memory that outlives its holder: one who died holding it is replaced.
#pragma once

#include <atomic>
#include <cstdint>

#include "shm/owner.h"

namespace aegaeon::shm {

// Not a pthread robust mutex: those keep pointers in shared memory, and a damaged region must
// never make us follow one. Holding it, a process may die at any instruction; what it guards must
// therefore be right at every instruction, and is: both users publish by a single store.
class OwnerLock {
 public:
  // Tries for well under a microsecond.
  bool try_lock(Owner self);

  // Waits up to `patience_ns` for a live holder. False: it still holds.
  bool lock(Owner self, std::int64_t patience_ns);

  void unlock();

  Owner holder() const { return word_.load(std::memory_order_relaxed) & ~kContended; }

 private:
  bool wait_or_steal(Owner self, Owner current, std::int64_t timeout_ns);

  static constexpr Owner kContended = 1;

  std::atomic<Owner> word_;  // the holder, and kContended when somebody sleeps on its low half
};

static_assert(sizeof(OwnerLock) == 8 && std::atomic<Owner>::is_always_lock_free);

// Releases on every way out.
class OwnerLockGuard {
 public:
  explicit OwnerLockGuard(OwnerLock& held) : lock_(held) {}
  ~OwnerLockGuard() { lock_.unlock(); }
  OwnerLockGuard(const OwnerLockGuard&) = delete;
  OwnerLockGuard& operator=(const OwnerLockGuard&) = delete;

 private:
  OwnerLock& lock_;
};

}  // namespace aegaeon::shm

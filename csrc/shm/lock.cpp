#include "shm/lock.h"

#include <algorithm>

#include "shm/futex.h"

namespace aegaeon::shm {
namespace {

constexpr int kSpins = 64;
// How long to sleep before asking whether the holder lives; asking reads /proc, about 10 us.
constexpr std::int64_t kProbe = kMillisecond;

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the futex is the low half of the word");

const std::atomic<std::uint32_t>& low_half(const std::atomic<Owner>& word) {
  return reinterpret_cast<const std::atomic<std::uint32_t>&>(word);
}

}  // namespace

bool OwnerLock::try_lock(Owner self) {
  for (int spin = 0; spin < kSpins; ++spin) {
    Owner free = kNobody;
    if (word_.load(std::memory_order_relaxed) == kNobody &&
        word_.compare_exchange_weak(free, self, std::memory_order_acquire,
                                    std::memory_order_relaxed)) {
      return true;
    }
    relax();
  }
  return false;
}

bool OwnerLock::lock(Owner self, std::int64_t patience_ns) {
  if (try_lock(self)) {
    return true;
  }
  const std::int64_t deadline = now_ns() + patience_ns;
  for (std::int64_t left = patience_ns; left > 0; left = deadline - now_ns()) {
    Owner current = word_.load(std::memory_order_relaxed);
    if (current == kNobody) {
      // Others may sleep still, so whoever has slept takes it as contended.
      if (word_.compare_exchange_strong(current, self | kContended, std::memory_order_acquire)) {
        return true;
      }
    } else if (!(current & kContended)) {
      word_.compare_exchange_strong(current, current | kContended, std::memory_order_relaxed);
    } else if (wait_or_steal(self, current, std::min(left, kProbe))) {
      return true;
    }
  }
  return false;
}

bool OwnerLock::wait_or_steal(Owner self, Owner current, std::int64_t timeout_ns) {
  futex_wait(low_half(word_), static_cast<std::uint32_t>(current), timeout_ns);
  if (word_.load(std::memory_order_relaxed) != current || owner_is_alive(current)) {
    return false;
  }
  return word_.compare_exchange_strong(current, self | kContended, std::memory_order_acquire);
}

void OwnerLock::unlock() {
  if (word_.exchange(kNobody, std::memory_order_release) & kContended) {
    futex_wake(low_half(word_), 1);
  }
}

}  // namespace aegaeon::shm

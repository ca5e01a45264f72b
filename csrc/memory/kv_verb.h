// The time in which a verb of a KvPool runs, and how long it waits: recounting and closing look
// whether others do.
#pragma once

#include "memory/kv_pool.h"
#include "shm/futex.h"

namespace aegaeon::memory {

// How long a freeing sender waits for a receiver that has begun to take; one that is alive and not
// stopped needs microseconds.
constexpr std::int64_t kTakePatience = 2 * shm::kSecond;

class KvPool::Verb {
 public:
  explicit Verb(KvPool& pool) : pool_(pool) {
    pool_.verbs_begun_.fetch_add(1);  // first, so that close() sees us or we see it
    try {
      pool_.check_usable();
    } catch (...) {
      pool_.verbs_ended_.fetch_add(1);
      throw;
    }
  }
  ~Verb() { pool_.verbs_ended_.fetch_add(1); }
  Verb(const Verb&) = delete;
  Verb& operator=(const Verb&) = delete;

 private:
  KvPool& pool_;
};

// How long a verb waits for receivers, all its blocks together; it begins with the first wait.
class KvPool::Patience {
 public:
  bool is_over() {
    const std::int64_t now = shm::now_ns();
    deadline_ = deadline_ == 0 ? now + kTakePatience : deadline_;
    return now > deadline_;
  }

 private:
  std::int64_t deadline_ = 0;
};

}  // namespace aegaeon::memory

// The time in which a verb of a KvPool runs: recounting and closing look whether others do.
#pragma once

#include "memory/kv_pool.h"

namespace aegaeon::memory {

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

}  // namespace aegaeon::memory

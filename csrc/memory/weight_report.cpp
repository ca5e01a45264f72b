// What is told of a weight cache: how full it is, what is in it, what was evicted.
#include <algorithm>

#include "memory/weight_cache.h"
#include "shm/futex.h"

namespace aegaeon::memory {

std::uint64_t WeightCache::used_bytes() const {
  return std::min(directory_.used_bytes(), budget_bytes());
}

std::vector<EntryStatus> WeightCache::status() {
  const Directory::Locked held(directory_);
  directory_.bury_dead_clients();
  std::vector<EntryStatus> found;
  for (std::size_t slot = 0; slot < kEntries; ++slot) {
    const EntryState state = directory_.state(slot);
    if (state == EntryState::empty) continue;
    const Entry& entry = directory_.entry(slot);
    EntryStatus status{entry.model.get(),
                       name_of(state),
                       entry.size_bytes,
                       entry.stages,
                       entry.stages_done.load(),
                       directory_.pin_pids(slot),
                       {},
                       static_cast<double>(shm::now_ns() - entry.used_at_ns.load()) * 1e-9};
    for (std::size_t client = 0; client < kClients; ++client) {
      const shm::Owner owner = directory_.control().clients[client].load();
      if (owner != shm::kNobody && (entry.demand.load() >> client & 1) != 0) {
        status.demand_pids.push_back(shm::owner_pid(owner));
      }
    }
    found.push_back(std::move(status));
  }
  return found;
}

std::vector<Eviction> WeightCache::evictions() {
  const Directory::Locked held(directory_);
  const std::uint64_t end = directory_.control().evictions.load();
  std::vector<Eviction> found;
  // Not the oldest: the next eviction overwrites it, and may have been killed in the middle of
  // that.
  for (std::uint64_t number = end - std::min<std::uint64_t>(end, kEvictionRecords - 1);
       number < end; ++number) {
    const EvictionRecord& record = directory_.control().records[number % kEvictionRecords];
    if (record.number != number || !record.model.is_valid() || !record.reason.is_valid()) {
      directory_.damaged("a record of an eviction makes no sense");
    }
    found.push_back({number, record.model.get(), record.size_bytes, record.reason.get(),
                     record.time_s, record.pid});
  }
  return found;
}

}  // namespace aegaeon::memory

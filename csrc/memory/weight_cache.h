// The weight cache of a node: one copy of a model for all processes, loaded once, evicted by worth.
// What is shared, and how it changes, stands in directory.h; the bytes come in through reader.h.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "memory/directory.h"
#include "memory/eviction.h"
#include "memory/source_file.h"
#include "memory/spare.h"

namespace aegaeon::memory {

// What a thread reads at a time: with the pages before and after, two huge ones (see Reader).
constexpr std::size_t kChunkBytes = (std::size_t{4} << 20) - 2 * kDirectAlignment;

struct Wanted {
  ModelKey key;
  std::string model;  // for people
  std::uint64_t size_bytes;
  std::uint32_t stages;
};

struct EntryStatus {
  std::string model;
  std::string state;
  std::uint64_t size_bytes;
  std::uint32_t stages;
  std::uint32_t stages_done;
  std::vector<int> pin_pids;
  std::vector<int> demand_pids;
  double idle_s;
};

struct Eviction {
  std::uint64_t number;
  std::string model;
  std::uint64_t size_bytes;
  std::string reason;
  double time_s;
  int pid;
};

class CachedModel;

// One client of the cache, for one process; any thread may use it. A fork gets nothing from it.
class WeightCache : public std::enable_shared_from_this<WeightCache> {
 public:
  // Raises RegionError, RegionMismatch.
  WeightCache(const std::string& path, std::uint64_t budget_bytes);
  ~WeightCache();

  // The model's entry, found or made, evicting others when need be; null when there is no room for
  // it now, `refusal` then says why. Who makes it, or finds it without a loader, is its loader.
  // Throws BudgetTooSmall when it can never fit.
  std::shared_ptr<CachedModel> acquire(const Wanted& wanted, std::string& refusal);
  // Sleeps until there may be more room than when room_change() gave `seen`, up to `timeout_ns` or
  // a signal.
  std::uint32_t room_change();
  void wait_for_room(std::uint32_t seen, std::int64_t timeout_ns) const;

  // Says whether this client has requests for the model, now in the cache or not. Never waits for
  // another process.
  void set_demand(const ModelKey& key, bool is_wanted);
  // False when it is not here, or pinned, or being loaded.
  bool evict(const ModelKey& key);

  // Makes memory ready for the next model, of `bytes`: see spare.h. It takes a second for each GB.
  // False when shared memory is too full to go on.
  bool prepare(std::uint64_t bytes);

  // Cancels the loads of this client and drops its demand; pins stay with their models.
  void close();
  bool is_closed() const { return is_closed_.load(); }

  std::vector<EntryStatus> status();
  std::vector<Eviction> evictions();
  // A report, as of no one moment; it never waits.
  std::uint64_t used_bytes() const;
  // What is kept beside the models for the next one, with them at most the budget; and how much of
  // it is ready.
  std::uint64_t spare_bytes() const { return directory_.control().spare_bytes.load(); }
  std::uint64_t ready_bytes() const {
    return spare_bytes() == 0 ? 0 : ready_of(directory_.control().spare_word.load());
  }
  std::uint64_t budget_bytes() const { return directory_.budget_bytes(); }
  std::uint64_t bytes_read() const { return directory_.control().bytes_read.load(); }
  const std::string& path() const { return directory_.path(); }

 private:
  friend class CachedModel;

  using Slots = std::vector<std::size_t>;

  void check_usable() const;
  void check_wanted(const Wanted& wanted) const;
  void free_unpinned_failures();

  // With the lock held. One try of acquire; what is to be freed for the next one goes to `slots`.
  std::shared_ptr<CachedModel> find_or_create(const Wanted& wanted, std::string& refusal,
                                              Slots& slots);
  bool is_lost(std::size_t slot) const;
  void create(std::size_t slot, const Wanted& wanted);
  std::shared_ptr<CachedModel> open(std::size_t slot, bool is_new);
  // False, with the refusal, when there is no room; else there is once `slots` are freed.
  bool make_room(const Wanted& wanted, std::string& refusal, Slots& slots);
  bool begin_evictions(const std::vector<Candidate>& victims, const std::string& why, Slots& slots);
  void recycle(Slots& slots);
  std::vector<Candidate> candidates() const;
  Slots unpinned_failures() const;
  bool is_evictable(std::size_t slot) const;
  std::string refusal_of(const Wanted& wanted) const;

  Directory directory_;
  Spare spare_{directory_};
  shm::Owner owner_;
  std::size_t client_;
  std::atomic<bool> is_closed_{false};
  std::mutex mutex_;
  std::set<ModelKey> demand_;
};

}  // namespace aegaeon::memory

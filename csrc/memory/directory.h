// What the processes that share a weight cache know of it: its clients, entries and evictions, in
// a control region, under one lock. The bytes of an entry lie in a file of their own beside it.
//
// An entry's status, {generation, state}, is one word; each change of state is one store:
//
//   empty -> loading -> ready -> evicting -> freeing -> empty (next generation)
//            loading -> failed (its readers may still have it pinned) -> freeing
//            loading -> evicting, when its loader is gone
//
// - Changes are made under the lock. `evicting` never outlives the lock: whoever takes the lock and
//   finds it knows that its predecessor was killed. If the eviction has been recorded, which comes
//   after the look at the pins, it is completed, else the state before is put back.
// - `freeing` is decided: the file is emptied without the lock, since that takes long. The entry's
//   `owner` does it; when that one is dead, the next holder of the lock does.
// - Pins are taken without the lock: a client adds to its counter, then looks at the status; an
//   evictor stores `evicting`, then looks at the counters. Both are seq_cst, so one sees the other.
// - A dead client's counters and demand mean nothing; they are cleared before its slot is used
//   again.
// - No total is stored: what is used is summed up over the entries.
//
// - What is reported, and who has demand, is read and said without the lock: a stopped holder of it
//   must not stop others' loops. A reader may see an entry of before or after a change.
//
// All that is read from shared memory is checked on each use: damage raises RegionMismatch.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "shm/lock.h"
#include "shm/owner.h"
#include "shm/region.h"

namespace aegaeon::memory {

constexpr std::size_t kClients = 64;
constexpr std::size_t kEntries = 128;
constexpr std::size_t kEvictionRecords = 128;
constexpr std::uint32_t kMaxStages = 1 << 16;
// A model that others want is safe for twice its load's time, at most for this long: so that two
// instances take turns in a cache that is too small for both, rather than evict in vain.
constexpr std::int64_t kLongestProtection = 4'000'000'000;

using ModelKey = std::array<std::uint64_t, 4>;
// In shared memory, where it may be looked at while it is written.
using SharedKey = std::array<std::atomic<std::uint64_t>, 4>;

enum class EntryState : std::uint32_t { empty, loading, ready, evicting, freeing, failed };

const char* name_of(EntryState state);

// Text in shared memory, cut to what fits.
template <std::size_t kBytes>
struct Text {
  std::uint32_t length;
  std::array<char, kBytes> letters;

  void set(std::string_view text) {
    const std::size_t count = text.size() < kBytes ? text.size() : kBytes;
    text.copy(letters.data(), count);
    length = static_cast<std::uint32_t>(count);
  }
  bool is_valid() const { return length <= kBytes; }
  std::string get() const { return std::string(letters.data(), is_valid() ? length : 0); }
};

struct Entry {
  std::atomic<std::uint32_t> stages_done;
  std::atomic<std::uint32_t> signal;  // a futex that moves with all that waiters look for
  std::atomic<shm::Owner> owner;      // who loads it, or who frees it
  std::atomic<std::uint64_t> demand;  // a bit per client that has requests for it
  std::atomic<std::int64_t> used_at_ns;
  std::atomic<double> uses;  // decaying, as of used_at_ns
  std::array<std::atomic<std::uint32_t>, kClients> pins;
  SharedKey key;                           // written under the lock, as is the size
  std::atomic<std::uint64_t> size_bytes;   // of the model; written while the entry is empty
  std::atomic<std::uint64_t> ready_bytes;  // of its file, from the first: made ready, see spare.h
  // From here on under the lock.
  std::uint32_t stages;
  double reload_s;  // estimated, then measured
  std::int64_t protected_until_ns;
  std::uint64_t failed_generation;
  std::uint32_t lacked_memory;  // and that was the failure, not what is loaded
  Text<200> model;
  Text<600> failure;
};

struct EvictionRecord {
  std::uint64_t number;
  std::uint64_t slot;  // with the generation: of what it is the end
  std::uint64_t generation;
  std::uint64_t size_bytes;
  double time_s;  // since the epoch
  std::int32_t pid;
  Text<200> model;
  Text<240> reason;
};

struct Control {
  shm::OwnerLock lock;
  std::atomic<std::uint32_t> room_signal;  // a futex that moves when there may be more room
  std::atomic<std::uint32_t> room_wanted;  // somebody sleeps on it
  std::atomic<std::uint64_t> bytes_read;   // from files, by all
  std::atomic<std::uint64_t> evictions;
  std::atomic<double> load_bytes_per_s;  // as last measured
  // See spare.h.
  std::atomic<std::uint64_t> spare_bytes;
  std::atomic<std::uint64_t> spare_word;  // its number, and how much of it is ready
  std::atomic<shm::Owner> spare_owner;    // who fills it
  std::atomic<shm::Owner> step_owner;     // who is backing a huge page of what is the spare, or was
  std::atomic<std::uint64_t> step_at;     // and where that is
  std::array<std::atomic<shm::Owner>, kClients> clients;
  std::array<std::atomic<std::uint64_t>, kEntries> status;
  std::array<Entry, kEntries> entries;
  std::array<EvictionRecord, kEvictionRecords> records;
};

// Removes a data file. Truncated first, which gives its memory back at once whoever has it mapped
// still. Those must not look at it any more, and do not: they have no pin.
void remove_file(const std::string& path);

// What `bytes` take in memory.
constexpr std::uint64_t page_bytes(std::uint64_t bytes) { return (bytes + 4095) / 4096 * 4096; }

constexpr std::uint64_t status_of(std::uint64_t generation, EntryState state) {
  return generation << 3 | static_cast<std::uint64_t>(state);
}
constexpr std::uint64_t generation_of(std::uint64_t status) { return status >> 3; }

class Directory {
 public:
  // Attaches, or makes it. Raises RegionError, RegionMismatch (also when it has another budget).
  Directory(const std::string& path, std::uint64_t budget_bytes);
  Directory(const Directory&) = delete;
  Directory& operator=(const Directory&) = delete;

  // Holds the lock, and repairs what a holder that was killed has left. Raises RegionError when a
  // live process keeps it for long.
  class Locked {
   public:
    explicit Locked(Directory& directory);

   private:
    struct Taken {
      Taken(Directory& directory);
    };
    Taken taken_;
    shm::OwnerLockGuard guard_;
  };

  Control& control() const { return *control_; }
  Entry& entry(std::size_t slot) const { return control_->entries[slot]; }
  std::uint64_t status(std::size_t slot) const { return control_->status[slot].load(); }
  EntryState state(std::size_t slot) const;
  const std::string& path() const { return region_.path(); }
  std::uint64_t budget_bytes() const { return region_.parameters()[0]; }
  // Without the lock it is a report: the sum of what was seen one after another.
  std::uint64_t used_bytes() const;
  bool has_key(std::size_t slot, const ModelKey& key) const;
  std::string data_path(std::size_t slot, std::uint64_t generation) const;
  std::string data_path(std::size_t slot) const;  // as of now

  // The pins and demand of a client, which is ours or dead, are void, and its place is free.
  void clear_client(std::size_t client);

  // With the lock held.
  void set_state(std::size_t slot, EntryState state);
  std::size_t register_client();
  void bury_dead_clients();
  // A loading or ready entry of `key`.
  std::optional<std::size_t> find(const ModelKey& key) const;
  std::optional<std::size_t> find_empty() const;
  std::uint64_t client_mask() const;  // of those registered
  bool is_pinned(std::size_t slot) const;
  std::vector<int> pin_pids(std::size_t slot) const;
  bool has_live_owner(std::size_t slot) const;
  void record_eviction(std::size_t slot, const std::string& why);
  // From evicting or failed, which nobody uses any more, to freeing, by us.
  void begin_freeing(std::size_t slot);
  // The end of a freeing entry, whose file is gone.
  void empty(std::size_t slot);

  // Without the lock: empties the file of a freeing entry that is ours, then the entry itself.
  void free(std::size_t slot);

  void signal_entry(std::size_t slot);
  void signal_room();
  [[noreturn]] void damaged(const char* what) const;

 private:
  void repair();
  void repair_entry(std::size_t slot, EntryState found);
  bool is_eviction_recorded(std::size_t slot) const;

  shm::Region region_;
  Control* control_;
};

}  // namespace aegaeon::memory

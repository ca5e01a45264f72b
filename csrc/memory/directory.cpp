#include "memory/directory.h"

#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <new>

#include "memory/file.h"
#include "shm/errors.h"
#include "shm/futex.h"
#include "shm/ring.h"

namespace aegaeon::memory {
namespace {

constexpr std::uint64_t kMaxBudgetBytes = std::uint64_t{1} << 46;

shm::Region open_or_create(const std::string& path, std::uint64_t budget_bytes) {
  if (budget_bytes == 0 || budget_bytes > kMaxBudgetBytes) {
    throw shm::RegionError("a weight cache of " + std::to_string(budget_bytes) +
                           " bytes makes no sense; set --model-cache-budget-gb");
  }
  const auto start = [](std::byte* body) { new (body) Control(); };
  if (!shm::region_exists(path)) {
    try {
      return shm::Region::create(path, shm::RegionKind::weights, {budget_bytes, sizeof(Control)},
                                 sizeof(Control), start);
    } catch (const shm::RegionError&) {
      if (!shm::region_exists(path)) throw;  // else another process was faster
    }
  }
  return shm::Region::attach(path, shm::RegionKind::weights);
}

double epoch_s() {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

}  // namespace

const char* name_of(EntryState state) {
  constexpr const char* kNames[] = {"empty", "loading", "ready", "evicting", "freeing", "failed"};
  return kNames[static_cast<std::size_t>(state)];
}

void remove_file(const std::string& path) {
  const File file(open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (file.is_open() && ftruncate(file.get(), 0) != 0) {
    // Unlinking is all that is left; the memory comes back with the last mapping.
  }
  ::unlink(path.c_str());
}

Directory::Directory(const std::string& path, std::uint64_t budget_bytes)
    : region_(open_or_create(path, budget_bytes)),
      control_(std::launder(reinterpret_cast<Control*>(region_.body()))) {
  if (region_.parameters()[1] != sizeof(Control) || region_.body_bytes() != sizeof(Control)) {
    damaged("its body is not that of a weight cache");
  }
  if (region_.parameters()[0] != budget_bytes) {
    throw shm::RegionMismatch(path + " holds weights up to " +
                              std::to_string(region_.parameters()[0]) +
                              " bytes, this process wants " + std::to_string(budget_bytes) +
                              "; give all instances the same --model-cache-budget-gb");
  }
}

Directory::Locked::Taken::Taken(Directory& directory) {
  shm::OwnerLock& lock = directory.control().lock;
  if (!lock.lock(shm::self_owner(), shm::kLockPatience)) {
    throw shm::RegionError("pid " + std::to_string(shm::owner_pid(lock.holder())) +
                           " has been holding " + directory.path() +
                           " for seconds; is it stopped? continue or kill it");
  }
}

Directory::Locked::Locked(Directory& directory)
    : taken_(directory), guard_(directory.control().lock) {
  directory.repair();
}

EntryState Directory::state(std::size_t slot) const {
  const std::uint64_t state = status(slot) & 7;
  if (state > static_cast<std::uint64_t>(EntryState::failed)) {
    damaged("an entry is in no known state");
  }
  return static_cast<EntryState>(state);
}

void Directory::set_state(std::size_t slot, EntryState state) {
  control_->status[slot].store(status_of(generation_of(status(slot)), state));
}

std::uint64_t Directory::used_bytes() const {
  std::uint64_t used = 0;
  for (std::size_t slot = 0; slot < kEntries; ++slot) {
    if (state(slot) == EntryState::empty) continue;
    const std::uint64_t bytes = entry(slot).size_bytes.load();
    if (bytes == 0 || bytes > budget_bytes()) {
      damaged("an entry is larger than the cache");
    }
    used += page_bytes(bytes);
  }
  return used;
}

bool Directory::has_key(std::size_t slot, const ModelKey& key) const {
  return std::equal(key.begin(), key.end(), entry(slot).key.begin());
}

std::string Directory::data_path(std::size_t slot, std::uint64_t generation) const {
  return path() + "+" + std::to_string(slot) + "-" + std::to_string(generation);
}

std::string Directory::data_path(std::size_t slot) const {
  return data_path(slot, generation_of(status(slot)));
}

void Directory::repair() {
  for (std::size_t slot = 0; slot < kEntries; ++slot) {
    const EntryState found = state(slot);
    if (found == EntryState::empty) continue;
    const Entry& entry = this->entry(slot);
    if (entry.stages == 0 || entry.stages > kMaxStages || entry.stages_done.load() > entry.stages ||
        !entry.model.is_valid() || !entry.failure.is_valid()) {
      damaged("an entry has impossible sizes");
    }
    repair_entry(slot, found);
  }
}

void Directory::repair_entry(std::size_t slot, EntryState found) {
  const bool is_whole = entry(slot).stages_done.load() == entry(slot).stages;
  if (found == EntryState::evicting && !is_eviction_recorded(slot)) {
    set_state(slot, is_whole ? EntryState::ready : EntryState::loading);
  } else if (found == EntryState::evicting ||
             (found == EntryState::freeing && !has_live_owner(slot))) {
    remove_file(data_path(slot));
    empty(slot);
  } else if (found == EntryState::loading && is_whole && !has_live_owner(slot)) {
    set_state(slot, EntryState::ready);
    signal_entry(slot);
  }
}

bool Directory::is_eviction_recorded(std::size_t slot) const {
  const std::uint64_t end = control_->evictions.load();
  for (const EvictionRecord& record : control_->records) {
    if (record.number < end && record.slot == slot &&
        record.generation == generation_of(status(slot)) && record.size_bytes > 0) {
      return true;
    }
  }
  return false;
}

std::size_t Directory::register_client() {
  bury_dead_clients();
  for (std::size_t client = 0; client < kClients; ++client) {
    if (control_->clients[client].load() == shm::kNobody) {
      clear_client(client);
      control_->clients[client].store(shm::self_owner());
      return client;
    }
  }
  throw shm::RegionError(path() + " has " + std::to_string(kClients) +
                         " clients, which is all it takes; run fewer instances");
}

void Directory::clear_client(std::size_t client) {
  for (Entry& entry : control_->entries) {
    entry.pins[client].store(0);
    entry.demand.fetch_and(~(std::uint64_t{1} << client));
  }
  control_->clients[client].store(shm::kNobody);
}

void Directory::bury_dead_clients() {
  for (std::size_t client = 0; client < kClients; ++client) {
    const shm::Owner owner = control_->clients[client].load();
    if (owner != shm::kNobody && !shm::owner_is_alive(owner)) {
      clear_client(client);
    }
  }
}

std::optional<std::size_t> Directory::find(const ModelKey& key) const {
  for (std::size_t slot = 0; slot < kEntries; ++slot) {
    const EntryState found = state(slot);
    if ((found == EntryState::loading || found == EntryState::ready) && has_key(slot, key)) {
      return slot;
    }
  }
  return std::nullopt;
}

// The one whose generation is lowest, so that the message of a failure stays for those who wait.
std::optional<std::size_t> Directory::find_empty() const {
  std::optional<std::size_t> found;
  for (std::size_t slot = 0; slot < kEntries; ++slot) {
    if (state(slot) == EntryState::empty && (!found || status(slot) < status(*found))) {
      found = slot;
    }
  }
  return found;
}

std::uint64_t Directory::client_mask() const {
  std::uint64_t mask = 0;
  for (std::size_t client = 0; client < kClients; ++client) {
    if (control_->clients[client].load() != shm::kNobody) mask |= std::uint64_t{1} << client;
  }
  return mask;
}

bool Directory::is_pinned(std::size_t slot) const {
  for (std::size_t client = 0; client < kClients; ++client) {
    if (entry(slot).pins[client].load() != 0 && control_->clients[client].load() != shm::kNobody) {
      return true;
    }
  }
  return false;
}

std::vector<int> Directory::pin_pids(std::size_t slot) const {
  std::vector<int> pids;
  for (std::size_t client = 0; client < kClients; ++client) {
    const shm::Owner owner = control_->clients[client].load();
    if (owner != shm::kNobody && entry(slot).pins[client].load() != 0) {
      pids.push_back(shm::owner_pid(owner));
    }
  }
  return pids;
}

bool Directory::has_live_owner(std::size_t slot) const {
  const shm::Owner owner = entry(slot).owner.load();
  return owner == shm::self_owner() || shm::owner_is_alive(owner);
}

void Directory::record_eviction(std::size_t slot, const std::string& why) {
  const std::uint64_t number = control_->evictions.load();
  EvictionRecord& record = control_->records[number % kEvictionRecords];
  record.number = number;
  record.slot = slot;
  record.generation = generation_of(status(slot));
  record.size_bytes = entry(slot).size_bytes.load();
  record.time_s = epoch_s();
  record.pid = shm::owner_pid(shm::self_owner());
  record.model = entry(slot).model;
  record.reason.set(why);
  control_->evictions.store(number + 1);
}

void Directory::begin_freeing(std::size_t slot) {
  entry(slot).owner.store(shm::self_owner());
  set_state(slot, EntryState::freeing);
  signal_entry(slot);
}

// Given up before the lock is taken: when that fails, the next one who takes it ends the matter.
void Directory::free(std::size_t slot) {
  remove_file(data_path(slot));
  entry(slot).owner.store(shm::kNobody);
  const Locked repairs(*this);
}

void Directory::empty(std::size_t slot) {
  control_->status[slot].store(status_of(generation_of(status(slot)) + 1, EntryState::empty));
  signal_entry(slot);
  signal_room();
}

void Directory::signal_entry(std::size_t slot) {
  entry(slot).signal.fetch_add(1);
  shm::futex_wake(entry(slot).signal, INT_MAX);
}

void Directory::signal_room() {
  if (control_->room_wanted.load() != 0) {
    control_->room_wanted.store(0);
    control_->room_signal.fetch_add(1);
    shm::futex_wake(control_->room_signal, INT_MAX);
  }
}

void Directory::damaged(const char* what) const {
  throw shm::RegionMismatch(path() + " is damaged: " + what +
                            "; restart the servers that use it, which makes it anew");
}

}  // namespace aegaeon::memory

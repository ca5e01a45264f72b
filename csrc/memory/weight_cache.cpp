#include "memory/weight_cache.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <stdexcept>

#include "memory/cached_model.h"
#include "memory/errors.h"
#include "shm/errors.h"
#include "shm/futex.h"

namespace aegaeon::memory {
namespace {

constexpr double kGuessedBytesPerSecond = 1e9;

double seconds(std::int64_t nanoseconds) { return static_cast<double>(nanoseconds) * 1e-9; }

// A number from shared memory that the order of evictions, and nothing else, depends on.
double sane(double value) { return std::isfinite(value) && value > 0 ? std::min(value, 1e9) : 0; }

ModelKey key_of(const Entry& entry) {
  ModelKey key{};
  std::copy(entry.key.begin(), entry.key.end(), key.begin());
  return key;
}

std::string fixed(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f", value);
  return text;
}

}  // namespace

WeightCache::WeightCache(const std::string& path, std::uint64_t budget_bytes)
    : directory_(path, budget_bytes), owner_(shm::self_owner()) {
  const Directory::Locked held(directory_);
  client_ = directory_.register_client();
}

WeightCache::~WeightCache() {
  try {
    if (shm::self_owner() != owner_) return;  // a fork's copy of its parent's
    directory_.clear_client(client_);
    directory_.signal_room();
  } catch (const shm::Error&) {
    // Without /proc nobody knows who we are: the place is free once we end.
  }
}

void WeightCache::check_usable() const {
  if (is_closed()) {
    throw shm::RegionError("this weight cache, " + path() + ", has been closed");
  }
  if (shm::self_owner() != owner_) {
    throw shm::RegionError(path() + " was opened before this process was forked; open it again");
  }
}

void WeightCache::check_wanted(const Wanted& wanted) const {
  if (wanted.size_bytes == 0 || wanted.stages == 0 || wanted.stages > kMaxStages ||
      wanted.model.empty()) {
    throw std::invalid_argument("a cached model has a name, bytes, and 1 to 65536 stages");
  }
  if (page_bytes(wanted.size_bytes) > budget_bytes()) {
    throw BudgetTooSmall(wanted.model + " needs " + std::to_string(wanted.size_bytes) +
                         " bytes of weights, the cache holds " + std::to_string(budget_bytes()) +
                         "; raise --model-cache-budget-gb");
  }
}

std::shared_ptr<CachedModel> WeightCache::acquire(const Wanted& wanted, std::string& refusal) {
  check_usable();
  check_wanted(wanted);
  std::shared_ptr<CachedModel> model;
  Slots slots;
  do {
    slots.clear();
    {
      const Directory::Locked held(directory_);
      model = find_or_create(wanted, refusal, slots);
    }
    for (const std::size_t slot : slots) directory_.free(slot);
  } while (!slots.empty());
  if (model && !model->is_loader()) {
    model->populate();
    model->note_use();
  }
  return model;
}

std::shared_ptr<CachedModel> WeightCache::find_or_create(const Wanted& wanted, std::string& refusal,
                                                         Slots& slots) {
  if (const auto slot = directory_.find(wanted.key)) {
    const Entry& entry = directory_.entry(*slot);
    if (entry.size_bytes != wanted.size_bytes || entry.stages != wanted.stages) {
      directory_.damaged("the key of a model stands for one of another size");
    }
    if (!is_lost(*slot)) {
      return open(*slot, false);
    }
    directory_.record_eviction(*slot, "its file has been removed");
    directory_.begin_freeing(*slot);
    slots.push_back(*slot);
    return nullptr;
  }
  if (!make_room(wanted, refusal, slots) || !slots.empty()) {
    return nullptr;
  }
  const auto slot = directory_.find_empty();
  create(*slot, wanted);
  return open(*slot, true);
}

bool WeightCache::is_lost(std::size_t slot) const {
  if (directory_.state(slot) != EntryState::ready) {
    return false;
  }
  struct stat info{};
  const std::string data = directory_.data_path(slot);
  if (::stat(data.c_str(), &info) != 0) {
    return errno == ENOENT;  // what else keeps us from it is no reason to take it from others
  }
  return static_cast<std::uint64_t>(info.st_size) != directory_.entry(slot).size_bytes.load();
}

// All is written while the entry is empty; the last store is what makes it exist.
void WeightCache::create(std::size_t slot, const Wanted& wanted) {
  Entry& entry = directory_.entry(slot);
  const double rate = sane(directory_.control().load_bytes_per_s.load());
  std::copy(wanted.key.begin(), wanted.key.end(), entry.key.begin());
  entry.model.set(wanted.model);
  entry.size_bytes.store(wanted.size_bytes);
  entry.stages = wanted.stages;
  entry.stages_done.store(0);
  entry.reload_s =
      static_cast<double>(wanted.size_bytes) / (rate > 0 ? rate : kGuessedBytesPerSecond);
  entry.protected_until_ns = 0;
  entry.used_at_ns.store(shm::now_ns());
  entry.uses.store(1.0);
  entry.demand.store(0);
  entry.owner.store(owner_);
  directory_.set_state(slot, EntryState::loading);
}

std::shared_ptr<CachedModel> WeightCache::open(std::size_t slot, bool is_new) {
  Entry& entry = directory_.entry(slot);
  const bool is_loader =
      is_new || (directory_.state(slot) == EntryState::loading && !directory_.has_live_owner(slot));
  if (is_loader) entry.owner.store(owner_);
  {
    const std::lock_guard<std::mutex> held(mutex_);
    if (demand_.count(key_of(entry)) > 0) entry.demand.fetch_or(std::uint64_t{1} << client_);
  }
  auto model = std::make_shared<CachedModel>(shared_from_this(), slot, is_loader);
  model->map(is_new);
  return model;
}

bool WeightCache::make_room(const Wanted& wanted, std::string& refusal, Slots& slots) {
  const std::uint64_t used = directory_.used_bytes();
  const std::uint64_t after = used + page_bytes(wanted.size_bytes);
  const bool has_slot = directory_.find_empty().has_value();
  if (after <= budget_bytes() && has_slot) {
    return true;
  }
  directory_.bury_dead_clients();
  slots = unpinned_failures();
  for (const std::size_t slot : slots) directory_.begin_freeing(slot);
  if (!slots.empty()) {
    return true;
  }
  std::uint64_t need = after > budget_bytes() ? after - budget_bytes() : 0;
  std::size_t need_slots = has_slot ? 0 : 1;
  for (std::size_t slot = 0; slot < kEntries; ++slot) {
    // What others free at this moment comes by itself.
    if (directory_.state(slot) == EntryState::freeing) {
      need -= std::min(need, page_bytes(directory_.entry(slot).size_bytes));
      need_slots = 0;
    }
  }
  while (need > 0 || need_slots > 0) {
    const auto victims = choose_victims(candidates(), need, need_slots);
    if (!victims) break;
    if (begin_evictions(*victims, "room for " + wanted.model, slots)) {
      recycle(slots);
      // What others are still freeing is not here yet, though no more than that may be missing.
      return !slots.empty() || make_room(wanted, refusal, slots);
    }
  }
  refusal = refusal_of(wanted);
  return false;
}

// All or none: one that was pinned since it was chosen spoils the choice.
bool WeightCache::begin_evictions(const std::vector<Candidate>& victims, const std::string& why,
                                  Slots& slots) {
  bool are_unpinned = true;
  std::vector<EntryState> before;
  for (const Candidate& victim : victims) {
    before.push_back(directory_.state(victim.slot));
    directory_.set_state(victim.slot, EntryState::evicting);
    are_unpinned = are_unpinned && !directory_.is_pinned(victim.slot);
  }
  for (std::size_t at = 0; at < victims.size(); ++at) {
    const Candidate& victim = victims[at];
    if (!are_unpinned) {
      directory_.set_state(victim.slot, before[at]);
      continue;
    }
    const bool was_loading = before[at] == EntryState::loading;
    directory_.record_eviction(victim.slot, why + ": saves " + fixed(victim.value()) +
                                                " s of loading, idle " + fixed(victim.idle_s) +
                                                " s" + (was_loading ? ", its loader is gone" : ""));
    directory_.begin_freeing(victim.slot);
    slots.push_back(victim.slot);
  }
  return are_unpinned;
}

// The largest of those that go leaves its memory to the model that comes.
void WeightCache::recycle(Slots& slots) {
  const auto bytes = [this](std::size_t slot) { return directory_.entry(slot).size_bytes.load(); };
  const auto largest = std::max_element(
      slots.begin(), slots.end(),
      [&](std::size_t one, std::size_t other) { return bytes(one) < bytes(other); });
  if (spare_.recycle(*largest)) {
    directory_.empty(*largest);
    slots.erase(largest);
  }
}

std::vector<Candidate> WeightCache::candidates() const {
  const std::int64_t now = shm::now_ns();
  const std::uint64_t clients = directory_.client_mask();
  std::vector<Candidate> found;
  for (std::size_t slot = 0; slot < kEntries; ++slot) {
    if (!is_evictable(slot)) continue;
    const Entry& entry = directory_.entry(slot);
    const std::uint64_t demand = entry.demand.load() & clients;
    const bool others_want_it = (demand & ~(std::uint64_t{1} << client_)) != 0;
    const std::int64_t guard_ns = entry.protected_until_ns - now;
    if (others_want_it && guard_ns > 0 && guard_ns <= kLongestProtection) continue;
    const double idle_s = std::max(seconds(now - entry.used_at_ns.load()), 0.0);
    found.push_back({slot, page_bytes(entry.size_bytes), sane(entry.reload_s),
                     decayed_uses(sane(entry.uses.load()), idle_s),
                     static_cast<unsigned>(__builtin_popcountll(demand)), idle_s});
  }
  return found;
}

bool WeightCache::is_evictable(std::size_t slot) const {
  const EntryState found = directory_.state(slot);
  return (found == EntryState::ready ||
          (found == EntryState::loading && !directory_.has_live_owner(slot))) &&
         !directory_.is_pinned(slot);
}

WeightCache::Slots WeightCache::unpinned_failures() const {
  Slots slots;
  for (std::size_t slot = 0; slot < kEntries; ++slot) {
    if (directory_.state(slot) == EntryState::failed && !directory_.is_pinned(slot)) {
      slots.push_back(slot);
    }
  }
  return slots;
}

void WeightCache::free_unpinned_failures() {
  Slots slots;
  {
    const Directory::Locked held(directory_);
    directory_.bury_dead_clients();
    slots = unpinned_failures();
    for (const std::size_t slot : slots) directory_.begin_freeing(slot);
  }
  for (const std::size_t slot : slots) directory_.free(slot);
}

std::string WeightCache::refusal_of(const Wanted& wanted) const {
  std::string text = wanted.model + " needs " + std::to_string(wanted.size_bytes) +
                     " bytes of weights, " + std::to_string(directory_.used_bytes()) + " of " +
                     std::to_string(budget_bytes()) + " are taken";
  for (std::size_t slot = 0; slot < kEntries; ++slot) {
    const EntryState found = directory_.state(slot);
    if (found == EntryState::empty) continue;
    text += ", " + directory_.entry(slot).model.get() + " is ";
    const auto pids = directory_.pin_pids(slot);
    text += pids.empty() ? (found == EntryState::ready ? "kept for others" : name_of(found))
                         : "pinned by pids";
    for (const int pid : pids) text += " " + std::to_string(pid);
  }
  return text + "; wait for a turn to end, or raise --model-cache-budget-gb";
}

std::uint32_t WeightCache::room_change() {
  Control& control = directory_.control();
  control.room_wanted.store(1);
  return control.room_signal.load();
}

// Said again, since a signal of before room_change() may have taken it back after: no later one
// would come.
void WeightCache::wait_for_room(std::uint32_t seen, std::int64_t timeout_ns) const {
  directory_.control().room_wanted.store(1);
  shm::futex_wait(directory_.control().room_signal, seen, timeout_ns);
}

// Without the directory's lock, which a stopped process may hold. Our mutex keeps open() from
// setting our bit of an entry meanwhile: so where one turns out to stand for another model by now,
// the bit may be taken back.
void WeightCache::set_demand(const ModelKey& key, bool is_wanted) {
  check_usable();
  const std::lock_guard<std::mutex> held(mutex_);
  is_wanted ? static_cast<void>(demand_.insert(key)) : static_cast<void>(demand_.erase(key));
  const std::uint64_t bit = std::uint64_t{1} << client_;
  for (std::size_t slot = 0; slot < kEntries; ++slot) {
    const std::uint64_t status = directory_.status(slot);
    if (directory_.state(slot) == EntryState::empty || !directory_.has_key(slot, key)) continue;
    std::atomic<std::uint64_t>& demand = directory_.entry(slot).demand;
    is_wanted ? demand.fetch_or(bit) : demand.fetch_and(~bit);
    if (generation_of(directory_.status(slot)) != generation_of(status)) {
      demand.fetch_and(~bit);
    }
  }
  if (!is_wanted) directory_.signal_room();
}

bool WeightCache::evict(const ModelKey& key) {
  check_usable();
  Slots slots;
  {
    const Directory::Locked held(directory_);
    directory_.bury_dead_clients();
    const auto slot = directory_.find(key);
    if (!slot || !is_evictable(*slot)) return false;
    const Entry& entry = directory_.entry(*slot);
    const double idle_s = std::max(seconds(shm::now_ns() - entry.used_at_ns.load()), 0.0);
    const Candidate asked{*slot,
                          entry.size_bytes,
                          sane(entry.reload_s),
                          decayed_uses(sane(entry.uses.load()), idle_s),
                          0,
                          idle_s};
    if (!begin_evictions({asked}, "asked for", slots)) return false;
  }
  for (const std::size_t slot : slots) directory_.free(slot);
  return true;
}

bool WeightCache::prepare(std::uint64_t bytes) {
  check_usable();
  return spare_.prepare(bytes, [this] { return is_closed(); });
}

void WeightCache::close() {
  if (is_closed_.exchange(true) || shm::self_owner() != owner_) return;
  const std::lock_guard<std::mutex> held(mutex_);
  demand_.clear();
  for (Entry& entry : directory_.control().entries) {
    entry.demand.fetch_and(~(std::uint64_t{1} << client_));
  }
  directory_.signal_room();
}

}  // namespace aegaeon::memory

#include "shm/table.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <limits>
#include <new>

#include "shm/errors.h"

namespace aegaeon::shm {

using Word = std::atomic<std::uint64_t>;

constexpr std::size_t kKeyWords = kMaxKeyBytes / 8;

struct TableSet {
  alignas(64) OwnerLock lock;
  alignas(64) std::array<std::atomic<std::uint32_t>, kSetSlots> tags;
  std::array<std::atomic<std::int64_t>, kSetSlots> lease_ends_ns;  // 0: free
};

// The value's words follow.
struct TableCopy {
  Word lengths;  // of the key, and of the value in the upper half
  Word fence;
  std::array<Word, kKeyWords> key;
};

// Two copies follow, each with its value.
struct TableSlot {
  Word version;
};

struct TableKey {
  std::array<std::uint64_t, kKeyWords> words{};
  std::uint32_t bytes;
  std::uint64_t hash = 0;

  explicit TableKey(std::string_view key) : bytes(static_cast<std::uint32_t>(key.size())) {
    if (key.empty() || key.size() > kMaxKeyBytes) {
      throw RecordTooLarge("a key has 1 to " + std::to_string(kMaxKeyBytes) + " bytes, this one " +
                           std::to_string(key.size()));
    }
    std::memcpy(words.data(), key.data(), key.size());
    for (const std::uint64_t word : words) {
      hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 32;
    }
    hash = (hash ^ bytes) * 0xbf58476d1ce4e5b9u;
    hash ^= hash >> 31;
  }

  std::uint32_t tag() const { return static_cast<std::uint32_t>(hash); }
};

// A committed copy, taken out of shared memory.
struct Table::Entry {
  std::uint32_t key_bytes = 0;
  std::uint64_t fence = 0;
  std::array<std::uint64_t, kKeyWords> key{};
  std::string value;

  bool has(const TableKey& wanted) const {
    return key_bytes == wanted.bytes && key == wanted.words;
  }
};

namespace {

constexpr std::size_t kMaxSlots = std::size_t{1} << 24;
constexpr std::size_t kMaxSlotBytes = std::size_t{1} << 20;
constexpr int kReadTries = 10'000;

struct Sizes {
  std::size_t sets;
  std::size_t ways;
  std::size_t body_bytes;
};

std::size_t copy_bytes(std::size_t slot_bytes) {
  return sizeof(TableCopy) + ((slot_bytes + 7) & ~std::size_t{7});
}

std::size_t slot_stride(std::size_t slot_bytes) {
  return (sizeof(TableSlot) + 2 * copy_bytes(slot_bytes) + 63) & ~std::size_t{63};
}

std::optional<Sizes> sizes_of(std::size_t slots, std::size_t slot_bytes) {
  if (slots < 1 || slots > kMaxSlots || slot_bytes < 1 || slot_bytes > kMaxSlotBytes) {
    return std::nullopt;
  }
  const std::size_t ways = std::min(slots, kSetSlots);
  const std::size_t sets = (slots + ways - 1) / ways;
  return Sizes{sets, ways, sets * (sizeof(TableSet) + ways * slot_stride(slot_bytes))};
}

void store_bytes(Word* words, const char* bytes, std::size_t count) {
  for (std::size_t at = 0; at < count; at += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes + at, std::min<std::size_t>(8, count - at));
    words[at / 8].store(word, std::memory_order_release);
  }
}

void load_bytes(const Word* words, char* bytes, std::size_t count) {
  for (std::size_t at = 0; at < count; at += 8) {
    const std::uint64_t word = words[at / 8].load(std::memory_order_acquire);
    std::memcpy(bytes + at, &word, std::min<std::size_t>(8, count - at));
  }
}

Word* value_words(TableCopy& copy) { return std::launder(reinterpret_cast<Word*>(&copy + 1)); }

std::int64_t lease_end(std::int64_t now, std::int64_t lease_ns) {
  const std::int64_t room = std::numeric_limits<std::int64_t>::max() - now;
  return now + std::clamp<std::int64_t>(lease_ns, 0, room);
}

void check_fence(const PutOptions& options, bool is_live, std::uint64_t fence) {
  if (is_live && fence != options.fence &&
      (options.mode == PutMode::renew || fence > options.fence)) {
    throw StaleIncarnation("fence " + std::to_string(options.fence) + " meets fence " +
                           std::to_string(fence) + ": the entry has another owner; stop writing");
  }
  if (!is_live && options.mode == PutMode::renew) {
    throw StaleIncarnation("the lease of fence " + std::to_string(options.fence) +
                           " has ended; register again with a higher one");
  }
}

}  // namespace

Table::Table(Region region)
    : region_(std::move(region)), sets_(0), ways_(0), slot_bytes_(region_.parameters()[1]) {
  const auto sizes = sizes_of(region_.parameters()[0], slot_bytes_);
  if (!sizes || sizes->body_bytes != region_.body_bytes()) {
    throw RegionMismatch(path() + " claims a table of " + std::to_string(region_.parameters()[0]) +
                         " slots of " + std::to_string(slot_bytes_) + " bytes in " +
                         std::to_string(region_.body_bytes()) +
                         " bytes, which does not fit; stop its servers and remove the file");
  }
  sets_ = sizes->sets;
  ways_ = sizes->ways;
}

Table Table::create(const std::string& path, std::size_t slots, std::size_t slot_bytes) {
  const auto sizes = sizes_of(slots, slot_bytes);
  if (!sizes) {
    throw RegionError(path + ": a table has 1 to " + std::to_string(kMaxSlots) + " slots of 1 to " +
                      std::to_string(kMaxSlotBytes) + " bytes, not " + std::to_string(slots) +
                      " of " + std::to_string(slot_bytes));
  }
  // Zeroed memory is an empty table: free slots, locks that nobody holds.
  return Table(Region::create(path, RegionKind::table, {slots, slot_bytes}, sizes->body_bytes,
                              [](std::byte*) {}));
}

Table Table::attach(const std::string& path) {
  return Table(Region::attach(path, RegionKind::table));
}

Table Table::open_or_create(const std::string& path, std::size_t slots, std::size_t slot_bytes) {
  // Between two tries somebody has created or removed it; that cannot go on.
  for (int attempt = 0;; ++attempt) {
    try {
      if (region_exists(path)) {
        Table table = attach(path);
        const auto [has_slots, has_bytes] = table.region_.parameters();
        if (has_slots != slots || has_bytes != slot_bytes) {
          throw RegionMismatch(path + " has " + std::to_string(has_slots) + " slots of " +
                               std::to_string(has_bytes) + " bytes, this process wants " +
                               std::to_string(slots) + " of " + std::to_string(slot_bytes) +
                               "; give all processes the same settings, or remove the file");
        }
        return table;
      }
      return create(path, slots, slot_bytes);
    } catch (const RegionMismatch&) {
      throw;
    } catch (const RegionError&) {
      if (attempt == 100) throw;
    }
  }
}

std::size_t Table::set_of(const TableKey& key) const { return (key.hash >> 32) * sets_ >> 32; }

TableSet& Table::set_at(std::size_t set) const {
  return *std::launder(reinterpret_cast<TableSet*>(region_.body() + set * sizeof(TableSet)));
}

TableSlot& Table::slot_at(std::size_t set, std::size_t way) const {
  std::byte* slots = region_.body() + sets_ * sizeof(TableSet);
  return *std::launder(
      reinterpret_cast<TableSlot*>(slots + (set * ways_ + way) * slot_stride(slot_bytes_)));
}

TableCopy& Table::copy_at(TableSlot& slot, std::uint64_t version) const {
  auto* copies = reinterpret_cast<std::byte*>(&slot + 1);
  return *std::launder(
      reinterpret_cast<TableCopy*>(copies + (version & 1) * copy_bytes(slot_bytes_)));
}

bool Table::read(std::size_t set, std::size_t way, Entry& entry) const {
  TableSlot& slot = slot_at(set, way);
  for (int attempt = 0; attempt < kReadTries; ++attempt) {
    const std::uint64_t version = slot.version.load(std::memory_order_acquire);
    TableCopy& copy = copy_at(slot, version);
    const std::uint64_t lengths = copy.lengths.load(std::memory_order_acquire);
    const std::size_t value_bytes = lengths >> 32;
    entry.key_bytes = static_cast<std::uint32_t>(lengths);
    const bool fits = value_bytes <= slot_bytes_ && entry.key_bytes <= kMaxKeyBytes;
    if (fits) {
      entry.fence = copy.fence.load(std::memory_order_acquire);
      for (std::size_t at = 0; at < kKeyWords; ++at) {
        entry.key[at] = copy.key[at].load(std::memory_order_acquire);
      }
      entry.value.resize(value_bytes);
      load_bytes(value_words(copy), entry.value.data(), value_bytes);
    }
    if (slot.version.load(std::memory_order_relaxed) == version) {
      if (!fits) damaged("an entry has an impossible length");
      return entry.key_bytes > 0;
    }
  }
  damaged("an entry never comes to rest");
}

std::optional<std::size_t> Table::find(std::size_t set, const TableKey& key, Entry& entry) const {
  const TableSet& slots = set_at(set);
  const std::uint32_t tag = key.tag();
  for (std::size_t way = 0; way < ways_; ++way) {
    if (slots.tags[way].load(std::memory_order_acquire) == tag && read(set, way, entry) &&
        entry.has(key)) {
      return way;
    }
  }
  return std::nullopt;
}

std::size_t Table::choose_way(std::size_t set, PutMode mode, std::int64_t now) const {
  const TableSet& slots = set_at(set);
  std::size_t first_to_end = 0;
  std::int64_t earliest = std::numeric_limits<std::int64_t>::max();
  for (std::size_t way = 0; way < ways_; ++way) {
    const std::int64_t end = slots.lease_ends_ns[way].load(std::memory_order_relaxed);
    if (end <= now) {
      return way;
    }
    if (end < earliest) {
      earliest = end;
      first_to_end = way;
    }
  }
  if (mode != PutMode::evict) {
    throw TableFull(path() + " has no free slot for this key among its " + std::to_string(ways_) +
                    "; wait for leases to end, or make the table larger");
  }
  return first_to_end;
}

void Table::write(std::size_t set, std::size_t way, const TableKey& key, std::string_view value,
                  std::uint64_t fence) {
  TableSlot& slot = slot_at(set, way);
  const std::uint64_t version = slot.version.load(std::memory_order_relaxed) + 1;
  TableCopy& copy = copy_at(slot, version);
  copy.lengths.store(key.bytes | std::uint64_t{value.size()} << 32, std::memory_order_release);
  copy.fence.store(fence, std::memory_order_release);
  for (std::size_t at = 0; at < kKeyWords; ++at) {
    copy.key[at].store(key.words[at], std::memory_order_release);
  }
  store_bytes(value_words(copy), value.data(), value.size());
  slot.version.store(version, std::memory_order_release);
}

bool Table::put(std::string_view key_bytes, std::string_view value, PutOptions options,
                std::int64_t patience_ns) {
  check_value(value);
  const TableKey key(key_bytes);
  const std::size_t set = set_of(key);
  TableSet& slots = set_at(set);
  if (!lock(slots, patience_ns)) {
    return false;
  }
  const OwnerLockGuard held(slots.lock);
  const std::int64_t now = now_ns();
  Entry entry;
  auto way = find(set, key, entry);
  const bool is_live = way && slots.lease_ends_ns[*way].load(std::memory_order_relaxed) > now;
  check_fence(options, is_live, entry.fence);
  if (!way) {
    way = choose_way(set, options.mode, now);
    slots.lease_ends_ns[*way].store(0, std::memory_order_release);
  }
  write(set, *way, key, value, options.fence);
  slots.tags[*way].store(key.tag(), std::memory_order_release);
  slots.lease_ends_ns[*way].store(lease_end(now, options.lease_ns), std::memory_order_release);
  return true;
}

bool Table::remove(std::string_view key_bytes, std::uint64_t fence, std::int64_t patience_ns,
                   bool& removed) {
  const TableKey key(key_bytes);
  const std::size_t set = set_of(key);
  TableSet& slots = set_at(set);
  if (!lock(slots, patience_ns)) {
    return false;
  }
  const OwnerLockGuard held(slots.lock);
  Entry entry;
  const auto way = find(set, key, entry);
  removed = way && entry.fence == fence &&
            slots.lease_ends_ns[*way].load(std::memory_order_relaxed) > now_ns();
  if (removed) {
    slots.lease_ends_ns[*way].store(0, std::memory_order_release);
  }
  return true;
}

std::optional<std::string> Table::get(std::string_view key_bytes) const {
  const TableKey key(key_bytes);
  const std::size_t set = set_of(key);
  const TableSet& slots = set_at(set);
  const std::uint32_t tag = key.tag();
  const std::int64_t now = now_ns();
  Entry entry;
  for (std::size_t way = 0; way < ways_; ++way) {
    if (slots.tags[way].load(std::memory_order_acquire) == tag &&
        slots.lease_ends_ns[way].load(std::memory_order_acquire) > now && read(set, way, entry) &&
        entry.has(key)) {
      return std::move(entry.value);
    }
  }
  return std::nullopt;
}

std::vector<std::pair<std::string, std::string>> Table::items() const {
  std::vector<std::pair<std::string, std::string>> found;
  const std::int64_t now = now_ns();
  Entry entry;
  for (std::size_t set = 0; set < sets_; ++set) {
    for (std::size_t way = 0; way < ways_; ++way) {
      if (set_at(set).lease_ends_ns[way].load(std::memory_order_acquire) > now &&
          read(set, way, entry)) {
        found.emplace_back(
            std::string(reinterpret_cast<const char*>(entry.key.data()), entry.key_bytes),
            entry.value);
      }
    }
  }
  return found;
}

bool Table::lock(TableSet& set, std::int64_t patience_ns) {
  const Owner self = self_owner();
  return patience_ns > 0 ? set.lock.lock(self, patience_ns) : set.lock.try_lock(self);
}

int Table::lock_holder_pid(std::string_view key) const {
  return owner_pid(set_at(set_of(TableKey(key))).lock.holder());
}

void Table::check_value(std::string_view value) const {
  if (value.size() > slot_bytes_) {
    throw RecordTooLarge("a value of " + std::to_string(value.size()) + " bytes does not fit; " +
                         path() + " takes up to " + std::to_string(slot_bytes_));
  }
}

void Table::damaged(const char* what) const {
  throw RegionMismatch(path() + " is damaged: " + what +
                       "; restart the servers that use it, which makes it anew");
}

}  // namespace aegaeon::shm

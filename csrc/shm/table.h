// A table of leased entries in shared memory: bytes by key, readers never wait for anyone.
//
// Layout. The table is cut into sets of up to 64 slots; a key belongs to one set, by its hash, and
// may stand in any slot of it, once. A set has one OwnerLock for its writers, and per slot a tag
// (part of the hash, a hint that spares looking at keys) and the end of the lease. A slot has a
// version counter and two copies of {lengths, fence, key, value}; the committed copy is the one
// that the counter's lowest bit names.
//
// Writers, holding the set's lock, fill the other copy, commit it by one store of the version,
// then store tag and lease, in this order. An entry that takes a slot from another key first ends
// that one's lease. So a writer killed at any instruction leaves either the old entry, or the new
// one, or a free slot, and never a torn one, and never the old value under the new lease.
//
// Memory order. A reader loads the version (acquire), copies the committed copy word by word, and
// loads the version again: the same version means that the copy was not touched, for only a writer
// of a later version overwrites it. Words of a copy are stored with release and loaded with
// acquire: whoever sees a word of a later write also sees, through that word, the version stored
// before it, and so tries again. (Fences would do; thread sanitizers do not know them. On x86 both
// are plain moves.) Each failed try means that two writes of that slot have been committed
// meanwhile, so readers are delayed by progress only; kReadTries bounds even that. Tag and lease
// are stored with release after the version and loaded with acquire before it, so a live lease is
// never paired with the entry that was there before it.
//
// All that is read from shared memory is checked on each use: damage raises RegionMismatch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "shm/futex.h"
#include "shm/lock.h"
#include "shm/region.h"

namespace aegaeon::shm {

constexpr std::size_t kMaxKeyBytes = 64;
constexpr std::size_t kSetSlots = 64;

struct TableSet;
struct TableSlot;
struct TableCopy;
struct TableKey;

// How a put treats what it finds.
enum class PutMode {
  put,    // enter or replace, unless a live entry has a higher fence; TableFull without a slot
  renew,  // replace only a live entry of the same fence
  evict,  // like put, but takes the slot of the entry that expires first
};

struct PutOptions {
  std::int64_t lease_ns;
  std::uint64_t fence;
  PutMode mode;
};

class Table {
 public:
  // `slots` is rounded up to whole sets. Raises RegionError.
  static Table create(const std::string& path, std::size_t slots, std::size_t slot_bytes);
  static Table attach(const std::string& path);
  // Attaches, or creates if there is none; any number of processes may do so at once. Raises
  // RegionMismatch when what is there has other sizes.
  static Table open_or_create(const std::string& path, std::size_t slots, std::size_t slot_bytes);

  Table(Table&&) = default;

  // The writers return false when the lock was not to be had in `patience_ns` (0: a spin), having
  // done nothing. Raises StaleIncarnation, TableFull, RecordTooLarge, RegionMismatch.
  bool put(std::string_view key, std::string_view value, PutOptions options,
           std::int64_t patience_ns);
  // Ends the live entry of `key` that has this fence; `removed` says whether there was one.
  bool remove(std::string_view key, std::uint64_t fence, std::int64_t patience_ns, bool& removed);

  std::optional<std::string> get(std::string_view key) const;
  // What was live at some moment during the call, each entry whole; the order means nothing.
  std::vector<std::pair<std::string, std::string>> items() const;

  int lock_holder_pid(std::string_view key) const;
  std::size_t slots() const { return sets_ * ways_; }
  std::size_t slot_bytes() const { return slot_bytes_; }
  const std::string& path() const { return region_.path(); }

 private:
  struct Entry;

  explicit Table(Region region);

  std::size_t set_of(const TableKey& key) const;
  TableSet& set_at(std::size_t set) const;
  TableSlot& slot_at(std::size_t set, std::size_t way) const;
  TableCopy& copy_at(TableSlot& slot, std::uint64_t version) const;
  bool read(std::size_t set, std::size_t way, Entry& entry) const;
  std::optional<std::size_t> find(std::size_t set, const TableKey& key, Entry& entry) const;
  std::size_t choose_way(std::size_t set, PutMode mode, std::int64_t now) const;
  void write(std::size_t set, std::size_t way, const TableKey& key, std::string_view value,
             std::uint64_t fence);
  bool lock(TableSet& set, std::int64_t patience_ns);
  void check_value(std::string_view value) const;
  [[noreturn]] void damaged(const char* what) const;

  Region region_;
  std::size_t sets_;
  std::size_t ways_;  // slots of a set
  std::size_t slot_bytes_;
};

}  // namespace aegaeon::shm

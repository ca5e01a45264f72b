// A bounded ring of byte records in shared memory: many writers in any process, one reader.
//
// Layout. Positions count bytes since creation and never wrap; a position's place is its value
// modulo the capacity, a power of two. [tail, head) holds the committed records: an 8-byte
// RecordHeader, the payload, padding to 8. A payload may wrap around the end.
//
// Writers exclude each other by an OwnerLock. The holder writes its record behind `head` and
// commits it by one store of `head`. Killed before that store it has changed nothing that anyone
// reads, and the next writer overwrites it; killed after it, the record is whole. The reader takes
// no lock, so no writer can wedge it.
//
// Memory order.
// - payload: written before the store of `head` (seq_cst, hence release), read after the reader's
//   load of `head` (acquire). Freed space likewise: read before the store of `tail`, overwritten
//   after a writer's load of `tail`. `head`, written by the last holder, is seen by the next one
//   through the lock.
// - no lost wake-up: the reader stores `reader_waits` = 1, loads `record_signal`, then looks at
//   `head` once more; a writer stores `head`, then loads `reader_waits`. All of these are seq_cst,
//   so in their single order either the reader sees the record, or the writer sees the flag. In
//   the second case the writer moves `record_signal` before it wakes, so a reader that is not yet
//   asleep finds the word changed and does not sleep. Writers that wait for space use the same
//   pair, with `tail`, `writers_wait` and `space_signal`.
// - a writer killed between the store of `head` and the wake-up wakes nobody; therefore every
//   sleep ends after kWaitChunk and looks again.
//
// All that is read from shared memory is checked on each use: damage raises RegionMismatch.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "shm/futex.h"
#include "shm/lock.h"
#include "shm/region.h"
#include "shm/spin.h"

namespace aegaeon::shm {

constexpr std::size_t kMaxRecordBytes = std::size_t{1} << 20;
// The longest that a committed record stays unseen after its writer was killed; also how long
// a Python signal handler may be late.
constexpr std::int64_t kWaitChunk = 50 * kMillisecond;
// How long a live process may hold a lock (it is stopped, or the machine is stuck) before
// those who need it give up.
constexpr std::int64_t kLockPatience = 2 * kSecond;

struct RingControl;

enum class Sent {
  committed,
  full,
  locked,  // another writer holds the lock
};

class Ring {
 public:
  // Makes the ring and becomes its reader; `capacity_bytes` is rounded up to a power of two.
  static Ring create(const std::string& path, std::size_t capacity_bytes);
  // Opens it for sending.
  static Ring attach(const std::string& path);

  Ring(Ring&&) = default;

  // Sender. Commits the record and wakes the reader; waits up to `patience_ns` for the lock (0: as
  // long as a spin takes), never for space. Raises RecordTooLarge, RingClosed, RegionMismatch.
  Sent send(const void* payload, std::size_t bytes, std::int64_t patience_ns);
  // Sleeps until a record of `bytes` would fit, up to `timeout_ns` or a signal.
  void wait_for_space(std::size_t bytes, std::int64_t timeout_ns);
  // Raises RingClosed when the reader has closed the ring or is dead.
  void check_reader() const;
  // False when check_reader() would raise.
  bool has_reader() const;
  int lock_holder_pid() const;

  // Reader, one thread at a time. The length of the next record, if there is one.
  std::optional<std::size_t> next_length();
  // Copies the record that next_length() has just announced, and moves on.
  void take(void* payload);
  // Gives the space of what was taken back to the writers.
  void release();
  // Looks, then sleeps, until there is a record or a wake-up, up to `timeout_ns` or a signal.
  void wait_for_record(std::int64_t timeout_ns);
  // Looks for so long at most, before it sleeps.
  void look_at_most(std::int64_t longest_ns) { spin_.limit(longest_ns); }
  // True once per wake().
  bool consume_wake();

  // Anyone.
  void wake();
  // Tells all senders, in all processes, that nobody will read any more.
  void mark_closed();
  bool is_reader() const;
  std::size_t capacity_bytes() const { return capacity_; }
  std::size_t pending_bytes() const;
  const std::string& path() const { return region_.path(); }

 private:
  Ring(Region region, bool is_reader);

  bool append(const void* payload, std::size_t bytes);
  std::size_t free_bytes(std::uint64_t head, std::uint64_t tail) const;
  void copy_in(std::uint64_t position, const void* from, std::size_t bytes);
  void copy_out(std::uint64_t position, void* to, std::size_t bytes) const;
  void notify_reader();
  [[noreturn]] void damaged(const char* what) const;

  Region region_;
  RingControl* control_;
  std::byte* records_;
  std::size_t capacity_;
  Owner reader_;               // ourselves, or nobody when we only send
  std::uint64_t head_ = 0;     // reader: as last seen
  std::uint64_t tail_ = 0;     // reader: what was taken; ahead of the shared tail until release()
  std::size_t announced_ = 0;  // reader: what next_length() has said; not read twice
  SpinWindow spin_;            // reader
};

// Removes the file at `path`; a ring's senders get RingClosed from then on, so that they reopen.
// False when there was none.
bool unlink_region(const std::string& path);

}  // namespace aegaeon::shm

// One ordered copy: what is to be copied, how far it is, and what it waits for.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace aegaeon::copy {

// The memory is the caller's, and must last until the ticket has settled.
struct Segment {
  std::byte* to;
  const std::byte* from;
  std::size_t bytes;
};

constexpr unsigned kPriorities = 3;  // 0 goes first
constexpr std::size_t kNobodyWaits = std::numeric_limits<std::size_t>::max();

// What a device must have done before it may touch the memory of a copy.
class Fence {
 public:
  virtual ~Fence() = default;
};

struct Order {
  std::vector<Segment> segments;
  unsigned priority = 1;
  bool is_outward = false;  // from the device: the other direction of a duplex link
  std::shared_ptr<const Fence> fence = nullptr;
};

// What became of a ticket; lost: failed, as all others will.
enum class Outcome : std::uint8_t { open, done, cancelled, failed, lost };

// A place in the segments: `offset` into segment number `segment`.
struct Cursor {
  std::size_t segment = 0;
  std::size_t offset = 0;
};

// Raises std::invalid_argument for a bad priority, a null or wrapping range, or a segment that
// overlaps itself upwards.
void check_order(const Order& order);

// Whether one of the segments writes what another one, or itself, reads or writes, so that its
// chunks must be copied one after the other.
bool has_overlaps(const std::vector<Segment>& segments);

// All but `progress_bytes` and `outcome` is guarded by the lock of the queue it is in.
struct Ticket {
  explicit Ticket(Order order);

  // Whether its first `bytes` are in. All of them are only when it is done: it may have none.
  bool has(std::size_t bytes) const {
    return bytes < total_bytes ? progress_bytes.load(std::memory_order_acquire) >= bytes
                               : outcome == Outcome::done;
  }
  // No thread will touch its memory any more.
  bool is_over() const { return outcome != Outcome::open && touching == 0; }

  const std::vector<Segment> segments;
  const std::size_t total_bytes;
  const bool is_serial;  // has overlaps
  const bool is_outward;
  const std::shared_ptr<const Fence> fence;  // may be null

  // All bytes up to here are in: stored with release after the bytes themselves.
  std::atomic<std::size_t> progress_bytes{0};
  std::atomic<Outcome> outcome{Outcome::open};

  unsigned priority;
  std::uint64_t sequence = 0;
  bool has_settled = false;
  std::size_t awaited_bytes = kNobodyWaits;  // the least progress that somebody sleeps for
  std::string failure;

  std::vector<std::shared_ptr<Ticket>> after;       // what it waits for, until it is ready
  std::vector<std::shared_ptr<Ticket>> successors;  // who waits for it, until it has settled
  std::size_t waits_for = 0;

  Cursor cursor;                    // what is to be handed out next
  std::size_t claimed_bytes = 0;    // handed out so far
  std::vector<std::size_t> flying;  // where chunks begin that were handed out, not published
  unsigned touching = 0;            // threads that are copying for it

  std::int64_t ready_ns = 0;
  std::int64_t start_ns = 0;  // 0: not started
  std::int64_t end_ns = 0;    // 0: not ended
};

using TicketPtr = std::shared_ptr<Ticket>;

}  // namespace aegaeon::copy

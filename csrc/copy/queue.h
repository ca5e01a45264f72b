// Which chunk is copied next: priorities, dependencies, the link's timetable. No threads, no clock
// and no copying in here: the engine holds a lock around it and passes the time.
//
// A chunk is claimed, copied by whoever claimed it, handed back by copied(), and published by
// land() when its slot on the link ends. A ticket is over when no thread touches its memory; it has
// settled, and lets its successors start, when moreover all that it waited for has settled: a
// cancelled ticket still passes on the order in which its memory is used.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "copy/throttle.h"
#include "copy/ticket.h"

namespace aegaeon::copy {

constexpr std::size_t kMaxOpenTickets = 4096;
// Directions of the link, as a set: a bit for each.
enum Lanes : unsigned { kInwardLane = 1, kOutwardLane = 2, kBothLanes = 3 };

constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

// A chunk on its way: `bytes` of the ticket from `cursor` on, `begin` bytes into it.
struct Flight {
  TicketPtr ticket;
  Cursor cursor;
  std::size_t begin;
  std::size_t bytes;
  std::int64_t lands_ns;
  unsigned priority;  // the ticket's when it was claimed
};

class Queue {
 public:
  // 0 bytes per second: no link is emulated. Duplex: each direction has the whole rate.
  Queue(std::size_t chunk_bytes, std::uint64_t link_bytes_per_s, bool is_duplex);

  // Enters a new ticket that waits until all of `after` have settled, and gives those its priority
  // where theirs is lower. Raises CopyQueueFull.
  void add(const TicketPtr& ticket, const std::vector<TicketPtr>& after, std::int64_t now);
  // The chunk to copy now, if there is one in `lanes` and the link is free. Both directions of a
  // link that is not duplex are inward.
  std::optional<Flight> claim(std::int64_t now, Lanes lanes = kBothLanes);
  // The claimed bytes are in and fenced.
  void copied(Flight flight, std::int64_t now);
  // Copying them raised; the ticket ends here.
  void failed(const Flight& flight, const std::string& failure, std::int64_t now);
  // Publishes all that has landed.
  void land(std::int64_t now);
  // The time from which on claim() in `lanes` or land() may find something; kNever: not before a
  // change.
  std::int64_t next_event(Lanes lanes = kBothLanes) const;

  // Hands out nothing more of the ticket, which is over when its `touching` is 0.
  void cancel(const TicketPtr& ticket, std::int64_t now);
  void cancel_all(std::int64_t now);
  // All that are open are lost, for this reason.
  void lose_all(const std::string& why, std::int64_t now);
  // Moves the ticket, and all that it waits for, forward to `priority`; never back.
  void raise_priority(const TicketPtr& ticket, unsigned priority);

  // Tickets that have not settled.
  std::size_t open_tickets() const { return open_.size(); }
  // Moves whenever a ticket's progress has reached what is awaited, or its outcome or use of memory
  // may have changed.
  std::uint64_t changes() const { return changes_; }

 private:
  using Key = std::pair<unsigned, std::uint64_t>;  // priority, sequence

  static Key key_of(const Ticket& ticket) { return {ticket.priority, ticket.sequence}; }
  std::map<Key, TicketPtr>& ready_of(const Ticket& ticket) { return ready_[lane_of(ticket)]; }
  std::size_t lane_of(const Ticket& ticket) const { return is_duplex_ && ticket.is_outward; }
  static TicketPtr first_claimable(const std::map<Key, TicketPtr>& ready);
  Flight take_chunk(const TicketPtr& ticket, std::int64_t now);
  void make_ready(const TicketPtr& ticket, std::int64_t now);
  void publish(const Flight& flight, std::int64_t now);
  void end(const TicketPtr& ticket, Outcome outcome, std::int64_t now);
  void settle(const TicketPtr& ticket);
  void release(std::int64_t now);
  void end_early(const TicketPtr& ticket, Outcome outcome, std::int64_t now);

  std::size_t chunk_bytes_;
  bool is_duplex_;
  std::array<Link, 2> links_;
  std::array<std::map<Key, TicketPtr>, 2> ready_;  // not wholly handed out, waiting for nothing
  std::map<std::uint64_t, TicketPtr> open_;        // by sequence
  std::vector<Flight> landing_;                    // copied, not published
  std::vector<TicketPtr> released_;                // wait for nothing any more; see release()
  std::uint64_t next_sequence_ = 0;
  std::uint64_t changes_ = 0;
};

}  // namespace aegaeon::copy

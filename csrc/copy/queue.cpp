#include "copy/queue.h"

#include <algorithm>
#include <stdexcept>

#include "copy/errors.h"

namespace aegaeon::copy {
namespace {

bool has(Lanes lanes, std::size_t lane) { return ((lanes >> lane) & 1U) != 0; }

}  // namespace

Queue::Queue(std::size_t chunk_bytes, std::uint64_t link_bytes_per_s, bool is_duplex)
    : chunk_bytes_(chunk_bytes),
      is_duplex_(is_duplex),
      links_{Link(link_bytes_per_s), Link(link_bytes_per_s)} {
  if (chunk_bytes == 0) {
    throw std::invalid_argument("chunk_bytes is 0; 1 MiB is a good chunk");
  }
}

void Queue::add(const TicketPtr& ticket, const std::vector<TicketPtr>& after, std::int64_t now) {
  if (open_.size() >= kMaxOpenTickets) {
    throw CopyQueueFull(std::to_string(open_.size()) +
                        " copies are open, as many as there may be; wait for some of them");
  }
  ticket->sequence = next_sequence_++;
  open_.emplace(ticket->sequence, ticket);
  for (const TicketPtr& earlier : after) {
    if (earlier->has_settled) continue;
    earlier->successors.push_back(ticket);
    ticket->after.push_back(earlier);
    ++ticket->waits_for;
    raise_priority(earlier, ticket->priority);
  }
  if (ticket->waits_for == 0) {
    make_ready(ticket, now);
    release(now);
  }
}

void Queue::make_ready(const TicketPtr& ticket, std::int64_t now) {
  ticket->after.clear();
  if (ticket->outcome != Outcome::open) {
    settle(ticket);
    return;
  }
  ticket->ready_ns = now;
  if (ticket->total_bytes == 0) {
    ticket->start_ns = now;
    end(ticket, Outcome::done, now);
    return;
  }
  ready_of(*ticket).emplace(key_of(*ticket), ticket);
}

TicketPtr Queue::first_claimable(const std::map<Key, TicketPtr>& ready) {
  for (const auto& [key, ticket] : ready) {
    if (!ticket->is_serial || ticket->touching == 0) return ticket;
  }
  return nullptr;
}

std::optional<Flight> Queue::claim(std::int64_t now, Lanes lanes) {
  TicketPtr best;
  for (std::size_t lane = 0; lane < ready_.size(); ++lane) {
    if (!has(lanes, lane)) continue;
    if (links_[lane].is_limited() && links_[lane].free_at() > now) continue;
    const TicketPtr first = first_claimable(ready_[lane]);
    if (first && (!best || key_of(*first) < key_of(*best))) best = first;
  }
  if (!best) {
    return std::nullopt;
  }
  return take_chunk(best, now);
}

Flight Queue::take_chunk(const TicketPtr& ticket, std::int64_t now) {
  const std::size_t bytes = std::min(chunk_bytes_, ticket->total_bytes - ticket->claimed_bytes);
  const Slot slot = links_[lane_of(*ticket)].grant(ticket->ready_ns, now, bytes);
  if (ticket->start_ns == 0) {
    ticket->start_ns = slot.start_ns;
  }
  const Flight flight{ticket, ticket->cursor, ticket->claimed_bytes,
                      bytes,  slot.end_ns,    ticket->priority};
  ticket->flying.push_back(flight.begin);
  ++ticket->touching;
  ticket->claimed_bytes += bytes;
  if (ticket->claimed_bytes == ticket->total_bytes) {
    ready_of(*ticket).erase(key_of(*ticket));
  }
  Cursor& cursor = ticket->cursor;
  for (std::size_t left = bytes; left > 0;) {
    const std::size_t step = std::min(left, ticket->segments[cursor.segment].bytes - cursor.offset);
    cursor.offset += step;
    left -= step;
    if (cursor.offset == ticket->segments[cursor.segment].bytes) cursor = {cursor.segment + 1, 0};
  }
  return flight;
}

void Queue::copied(Flight flight, std::int64_t now) {
  const TicketPtr ticket = flight.ticket;
  --ticket->touching;
  if (ticket->outcome != Outcome::open) {
    settle(ticket);
  } else if (flight.lands_ns <= now) {
    publish(flight, now);
  } else {
    landing_.push_back(std::move(flight));
  }
  release(now);
}

void Queue::failed(const Flight& flight, const std::string& failure, std::int64_t now) {
  --flight.ticket->touching;
  if (flight.ticket->outcome == Outcome::open) {
    flight.ticket->failure = failure;
    end(flight.ticket, Outcome::failed, now);
  } else {
    settle(flight.ticket);
  }
  release(now);
}

void Queue::land(std::int64_t now) {
  for (std::size_t at = 0; at < landing_.size();) {
    if (landing_[at].lands_ns > now) {
      ++at;
      continue;
    }
    const Flight flight = std::move(landing_[at]);
    landing_.erase(landing_.begin() + static_cast<std::ptrdiff_t>(at));
    // Not `now`: what waits for it must not lose the time by which this thread is late.
    publish(flight, flight.lands_ns);
    release(flight.lands_ns);
  }
}

void Queue::publish(const Flight& flight, std::int64_t now) {
  Ticket& ticket = *flight.ticket;
  if (ticket.outcome != Outcome::open) {
    return;
  }
  auto& flying = ticket.flying;
  flying.erase(std::find(flying.begin(), flying.end(), flight.begin));
  const std::size_t progress =
      flying.empty() ? ticket.claimed_bytes : *std::min_element(flying.begin(), flying.end());
  ticket.progress_bytes.store(progress, std::memory_order_release);
  if (progress == ticket.total_bytes) {
    end(flight.ticket, Outcome::done, now);
  } else if (progress >= ticket.awaited_bytes) {
    ticket.awaited_bytes = kNobodyWaits;
    ++changes_;
  }
}

std::int64_t Queue::next_event(Lanes lanes) const {
  std::int64_t next = kNever;
  for (const Flight& flight : landing_) {
    next = std::min(next, flight.lands_ns);
  }
  for (std::size_t lane = 0; lane < ready_.size(); ++lane) {
    if (!has(lanes, lane)) continue;
    if (first_claimable(ready_[lane])) next = std::min(next, links_[lane].free_at());
  }
  return next;
}

void Queue::end(const TicketPtr& ticket, Outcome outcome, std::int64_t now) {
  ready_of(*ticket).erase(key_of(*ticket));
  ticket->end_ns = now;
  ticket->outcome = outcome;
  settle(ticket);
}

void Queue::settle(const TicketPtr& ticket) {
  if (!ticket->has_settled && ticket->is_over() && ticket->waits_for == 0) {
    ticket->has_settled = true;
    open_.erase(ticket->sequence);
    for (TicketPtr& successor : std::exchange(ticket->successors, {})) {
      if (--successor->waits_for == 0) released_.push_back(std::move(successor));
    }
  }
  ++changes_;
}

// A loop and not a recursion: one may release the next for as long as the queue is.
void Queue::release(std::int64_t now) {
  while (!released_.empty()) {
    const TicketPtr ticket = std::move(released_.back());
    released_.pop_back();
    make_ready(ticket, now);
  }
}

void Queue::cancel(const TicketPtr& ticket, std::int64_t now) {
  end_early(ticket, Outcome::cancelled, now);
}

void Queue::cancel_all(std::int64_t now) {
  const auto all = open_;
  for (const auto& [sequence, ticket] : all) cancel(ticket, now);
}

void Queue::lose_all(const std::string& why, std::int64_t now) {
  const auto all = open_;
  for (const auto& [sequence, ticket] : all) {
    if (ticket->outcome == Outcome::open) ticket->failure = why;
    end_early(ticket, Outcome::lost, now);
  }
}

void Queue::end_early(const TicketPtr& ticket, Outcome outcome, std::int64_t now) {
  if (ticket->outcome == Outcome::open) {
    end(ticket, outcome, now);
    release(now);
  }
}

void Queue::raise_priority(const TicketPtr& ticket, unsigned priority) {
  std::vector<TicketPtr> to_raise{ticket};
  while (!to_raise.empty()) {
    const TicketPtr raised = std::move(to_raise.back());
    to_raise.pop_back();
    if (raised->has_settled || raised->priority <= priority) continue;
    const bool is_ready = ready_of(*raised).erase(key_of(*raised)) > 0;
    raised->priority = priority;
    if (is_ready) ready_of(*raised).emplace(key_of(*raised), raised);
    to_raise.insert(to_raise.end(), raised->after.begin(), raised->after.end());
  }
}

}  // namespace aegaeon::copy

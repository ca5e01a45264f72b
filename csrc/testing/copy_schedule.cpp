// What the copy queue does when, on a clock of our own and without threads: `copy_schedule`.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "copy/errors.h"
#include "copy/queue.h"
#include "copy/throttle.h"

namespace {

using namespace aegaeon::copy;

constexpr std::size_t kChunk = 100;
constexpr std::uint64_t kRate = 1'000'000'000;  // a byte per nanosecond

void require(bool claim, const char* what) {
  if (!claim) {
    std::fprintf(stderr, "copy_schedule: %s\n", what);
    std::exit(1);
  }
}

// Nothing is copied here, so any address will do; each ticket gets its own.
TicketPtr ticket_of(std::size_t bytes, unsigned priority = 1, bool is_outward = false) {
  static std::uintptr_t next = 1 << 20;
  Order order;
  order.priority = priority;
  order.is_outward = is_outward;
  order.segments.push_back({reinterpret_cast<std::byte*>(next),
                            reinterpret_cast<const std::byte*>(next + bytes), bytes});
  next += 2 * bytes;
  return std::make_shared<Ticket>(std::move(order));
}

Flight must_claim(Queue& queue, const TicketPtr& expected, std::int64_t now, const char* what) {
  std::optional<Flight> flight = queue.claim(now);
  require(flight && flight->ticket == expected, what);
  return *flight;
}

void an_urgent_ticket_overtakes_between_chunks() {
  Queue queue(kChunk, 0, true);
  const TicketPtr weights = ticket_of(300);
  const TicketPtr more = ticket_of(100);
  queue.add(weights, {}, 1);
  queue.add(more, {}, 1);
  queue.copied(must_claim(queue, weights, 1, "the first ticket goes first"), 2);
  const TicketPtr urgent = ticket_of(100, 0);
  queue.add(urgent, {}, 2);
  queue.copied(must_claim(queue, urgent, 2, "an urgent ticket did not overtake"), 3);
  queue.copied(must_claim(queue, weights, 3, "equals lost their order"), 4);
  queue.raise_priority(more, 0);
  queue.copied(must_claim(queue, more, 4, "a raised ticket did not overtake"), 5);
  queue.copied(must_claim(queue, weights, 5, "the overtaken ticket was lost"), 6);
  require(!queue.claim(6) && queue.next_event() == kNever && queue.open_tickets() == 0,
          "something was left over");
}

void progress_has_no_gap() {
  Queue queue(kChunk, 0, true);
  const TicketPtr ticket = ticket_of(250);
  queue.add(ticket, {}, 1);
  const Flight first = must_claim(queue, ticket, 1, "no first chunk");
  const Flight second = must_claim(queue, ticket, 1, "no second chunk");
  const Flight third = must_claim(queue, ticket, 1, "no third chunk");
  require(third.bytes == 50 && third.begin == 200, "the last chunk is the rest");
  queue.copied(second, 2);
  require(ticket->progress_bytes == 0, "progress jumped over a chunk that is not in");
  queue.copied(first, 3);
  require(ticket->progress_bytes == 200 && !ticket->has(250), "progress is behind");
  queue.copied(third, 4);
  require(ticket->has(250) && ticket->end_ns == 4, "the ticket is not done");
}

void a_ticket_waits_for_those_it_names_and_lends_them_its_priority() {
  Queue queue(kChunk, 0, true);
  const TicketPtr out = ticket_of(200, 2);
  const TicketPtr other = ticket_of(100, 1);
  const TicketPtr in = ticket_of(100, 0);
  queue.add(out, {}, 1);
  queue.add(other, {}, 1);
  queue.add(in, {out}, 1);
  const Flight first = must_claim(queue, out, 1, "what an urgent ticket waits for is urgent");
  const Flight second = must_claim(queue, out, 1, "what an urgent ticket waits for is urgent");
  queue.copied(first, 2);
  queue.copied(must_claim(queue, other, 2, "a ticket started before what it waits for"), 3);
  require(!queue.claim(3), "a ticket started before what it waits for was in");
  queue.copied(second, 4);
  queue.copied(must_claim(queue, in, 4, "the ticket that waited was lost"), 5);
  require(in->has(100), "the ticket that waited is not done");
}

void a_cancelled_ticket_passes_the_order_on() {
  Queue queue(kChunk, 0, true);
  const TicketPtr first = ticket_of(100);
  const TicketPtr middle = ticket_of(100);
  const TicketPtr last = ticket_of(100);
  queue.add(first, {}, 1);
  queue.add(middle, {first}, 1);
  queue.add(last, {middle}, 1);
  const Flight flight = must_claim(queue, first, 1, "no first ticket");
  queue.cancel(middle, 2);
  require(middle->is_over() && !queue.claim(2), "the last overtook the first");
  queue.copied(flight, 3);
  queue.copied(must_claim(queue, last, 3, "the last ticket was lost"), 4);
  require(queue.open_tickets() == 0, "a cancelled ticket stayed open");
}

void a_cancelled_chunk_in_flight_holds_its_successors_back() {
  Queue queue(kChunk, 0, true);
  const TicketPtr first = ticket_of(300);
  const TicketPtr next = ticket_of(100);
  queue.add(first, {}, 1);
  queue.add(next, {first}, 1);
  const Flight flight = must_claim(queue, first, 1, "no first ticket");
  queue.cancel(first, 2);
  require(!first->is_over() && !queue.claim(2), "memory is in use, and another copy started");
  queue.copied(flight, 3);
  require(first->is_over() && first->progress_bytes == 0, "a cancelled ticket went on");
  must_claim(queue, next, 3, "the successor was lost");
}

void a_failure_ends_its_ticket_only() {
  Queue queue(kChunk, 0, true);
  const TicketPtr bad = ticket_of(300);
  const TicketPtr good = ticket_of(100);
  queue.add(bad, {}, 1);
  queue.add(good, {bad}, 1);
  const Flight first = must_claim(queue, bad, 1, "no first ticket");
  const Flight second = must_claim(queue, bad, 1, "no second chunk");
  queue.failed(first, "broken", 2);
  require(bad->outcome == Outcome::failed && bad->failure == "broken" && !queue.claim(2),
          "a failed ticket went on");
  queue.copied(second, 3);
  queue.copied(must_claim(queue, good, 3, "the next ticket was lost"), 4);
  require(good->has(100), "the next ticket failed too");
}

void overlapping_segments_go_one_chunk_at_a_time() {
  std::vector<std::byte> memory(1000);
  Order order;
  order.segments.push_back({memory.data(), memory.data() + 50, 400});
  const auto ticket = std::make_shared<Ticket>(std::move(order));
  require(ticket->is_serial && !ticket_of(400)->is_serial, "overlaps are mistaken");
  Queue queue(kChunk, 0, true);
  queue.add(ticket, {}, 1);
  const Flight flight = must_claim(queue, ticket, 1, "no first chunk");
  require(!queue.claim(1) && queue.next_event() == kNever, "two chunks of a move at once");
  queue.copied(flight, 2);
  must_claim(queue, ticket, 2, "no second chunk");
}

void the_queue_is_bounded() {
  Queue queue(kChunk, 0, true);
  std::vector<TicketPtr> tickets;
  for (std::size_t count = 0; count < kMaxOpenTickets; ++count) {
    tickets.push_back(ticket_of(1));
    queue.add(tickets.back(), {}, 1);
  }
  bool is_refused = false;
  try {
    queue.add(ticket_of(1), {}, 1);
  } catch (const CopyQueueFull&) {
    is_refused = true;
  }
  require(is_refused, "the queue has no bound");
  queue.cancel(tickets[17], 1);
  queue.add(ticket_of(1), {}, 1);
  queue.cancel_all(2);
  require(queue.open_tickets() == 0, "cancelling all left some");
}

// As long as the queue may be, so that a recursion would show.
void a_chain_of_empty_tickets_ends_at_once() {
  Queue queue(kChunk, 0, true);
  std::vector<TicketPtr> chain{ticket_of(1)};
  queue.add(chain.front(), {}, 1);
  while (chain.size() < kMaxOpenTickets) {
    chain.push_back(ticket_of(0));
    queue.add(chain.back(), {chain[chain.size() - 2]}, 1);
    require(!chain.back()->has(0), "an empty ticket did not wait for its turn");
  }
  queue.copied(must_claim(queue, chain.front(), 1, "no first ticket"), 2);
  require(chain.back()->has(0) && queue.open_tickets() == 0, "the chain is not done");
}

void a_link_publishes_at_its_rate() {
  Queue queue(kChunk, kRate, true);
  const TicketPtr ticket = ticket_of(300);
  queue.add(ticket, {}, 1000);
  queue.copied(must_claim(queue, ticket, 1000, "an idle link takes a chunk at once"), 1010);
  require(!queue.claim(1099) && queue.next_event() == 1100, "the link took a second chunk");
  queue.land(1099);
  require(ticket->progress_bytes == 0, "bytes were there before the link could bring them");
  queue.land(1100);
  require(ticket->progress_bytes == 100, "bytes came late");
  // 30 ns late, which the next slot does not pay for.
  queue.copied(must_claim(queue, ticket, 1130, "a free link takes a chunk"), 1140);
  require(queue.next_event() == 1200, "a late thread cost rate");
  queue.land(1215);
  queue.copied(must_claim(queue, ticket, 1215, "a free link takes a chunk"), 1320);
  require(ticket->has(300) && ticket->end_ns == 1320, "a chunk that copied slowly was held up");
}

void the_directions_of_a_duplex_link_have_a_rate_each() {
  for (const bool is_duplex : {true, false}) {
    Queue queue(kChunk, kRate, is_duplex);
    const TicketPtr in = ticket_of(100);
    const TicketPtr out = ticket_of(100, 1, true);
    queue.add(in, {}, 1);
    queue.add(out, {}, 1);
    const Flight first = must_claim(queue, in, 1, "no copy in");
    const std::optional<Flight> second = queue.claim(1);
    require(second.has_value() == is_duplex, "the directions do not have the rate they should");
    queue.copied(first, 2);
    queue.cancel_all(3);
  }
}

// What waits for a ticket starts when that was due, however late the thread is that notices.
void a_chain_of_tickets_loses_no_rate() {
  Queue queue(kChunk, kRate, true);
  const TicketPtr first = ticket_of(100);
  const TicketPtr second = ticket_of(100);
  queue.add(first, {}, 1000);
  queue.add(second, {first}, 1000);
  queue.copied(must_claim(queue, first, 1000, "no first ticket"), 1001);
  queue.land(1190);
  queue.copied(must_claim(queue, second, 1190, "no second ticket"), 1191);
  require(queue.next_event() == 1200, "a late thread cost the second ticket its rate");
}

void a_link_gives_no_credit_for_idle_time() {
  Link link(kRate);
  require(link.grant(1000, 1000, 100).end_ns == 1100, "the first slot is wrong");
  const Slot later = link.grant(5000, 5010, 100);
  require(later.start_ns == 5000 && later.end_ns == 5100, "idle time was made up for");
  const std::int64_t stalled = 5100 + 10 * Link::kCatchUpNs;
  require(link.grant(5000, stalled, 100).start_ns == stalled - Link::kCatchUpNs,
          "a long stall was made up for wholly");
}

void rounding_does_not_add_up() {
  constexpr std::uint64_t kOdd = 2'999'999'999;
  Link link(kOdd);
  std::int64_t end = 0;
  for (int count = 0; count < 100'000; ++count) end = link.grant(1, end, 1000).end_ns;
  const double exact = 1e5 * 1000 * 1e9 / static_cast<double>(kOdd);
  require(std::abs(static_cast<double>(end) - exact) < 10, "the rate drifts");
}

}  // namespace

int main() {
  an_urgent_ticket_overtakes_between_chunks();
  progress_has_no_gap();
  a_ticket_waits_for_those_it_names_and_lends_them_its_priority();
  a_cancelled_ticket_passes_the_order_on();
  a_cancelled_chunk_in_flight_holds_its_successors_back();
  a_failure_ends_its_ticket_only();
  overlapping_segments_go_one_chunk_at_a_time();
  the_queue_is_bounded();
  a_chain_of_empty_tickets_ends_at_once();
  a_link_publishes_at_its_rate();
  the_directions_of_a_duplex_link_have_a_rate_each();
  a_chain_of_tickets_loses_no_rate();
  a_link_gives_no_credit_for_idle_time();
  rounding_does_not_add_up();
  std::puts("copy_schedule: ok");
  return 0;
}

#include "copy/ticket.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

namespace aegaeon::copy {
namespace {

std::uintptr_t address(const std::byte* place) { return reinterpret_cast<std::uintptr_t>(place); }

struct Range {
  std::uintptr_t begin;
  std::uintptr_t end;
  bool is_written;
};

std::size_t sum_of(const std::vector<Segment>& segments) {
  std::size_t total = 0;
  for (const Segment& segment : segments) total += segment.bytes;
  return total;
}

}  // namespace

void check_order(const Order& order) {
  if (order.priority >= kPriorities) {
    throw std::invalid_argument("priority " + std::to_string(order.priority) +
                                " is out of range; give 0 (first) to " +
                                std::to_string(kPriorities - 1));
  }
  std::size_t total = 0;
  for (const Segment& segment : order.segments) {
    const std::uintptr_t to = address(segment.to);
    const std::uintptr_t from = address(segment.from);
    const std::size_t bytes = segment.bytes;
    if (bytes > 0 && (to == 0 || from == 0)) {
      throw std::invalid_argument("a segment has a null address; give (to, from, bytes)");
    }
    constexpr auto kLast = std::numeric_limits<std::uintptr_t>::max();
    if (bytes > kLast - to || bytes > kLast - from || bytes > kLast - total) {
      throw std::invalid_argument("a segment of " + std::to_string(bytes) +
                                  " bytes goes beyond the address space; give (to, from, bytes)");
    }
    if (from < to && to < from + bytes) {
      throw std::invalid_argument(
          "a segment overlaps itself upwards; only moves to lower addresses may overlap");
    }
    total += bytes;
  }
}

bool has_overlaps(const std::vector<Segment>& segments) {
  std::vector<Range> ranges;
  ranges.reserve(2 * segments.size());
  for (const Segment& segment : segments) {
    if (segment.bytes == 0) continue;
    ranges.push_back({address(segment.to), address(segment.to) + segment.bytes, true});
    ranges.push_back({address(segment.from), address(segment.from) + segment.bytes, false});
  }
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& left, const Range& right) { return left.begin < right.begin; });
  std::uintptr_t end_of_written = 0;
  std::uintptr_t end_of_all = 0;
  for (const Range& range : ranges) {
    if (range.begin < (range.is_written ? end_of_all : end_of_written)) {
      return true;
    }
    end_of_all = std::max(end_of_all, range.end);
    if (range.is_written) end_of_written = std::max(end_of_written, range.end);
  }
  return false;
}

Ticket::Ticket(Order order)
    : segments(std::move(order.segments)),
      total_bytes(sum_of(segments)),
      is_serial(has_overlaps(segments)),
      is_outward(order.is_outward),
      fence(std::move(order.fence)),
      priority(order.priority) {}

}  // namespace aegaeon::copy

// The timetable of a device link of a given rate, as plain arithmetic: time is an argument.
#pragma once

#include <cstddef>
#include <cstdint>

namespace aegaeon::copy {

// When a chunk is on the link, in nanoseconds of the caller's clock.
struct Slot {
  std::int64_t start_ns;
  std::int64_t end_ns;
};

// Grants slots one behind the other, by absolute times, so that a late thread loses no rate: its
// next slot starts where the last one ended, even in the past. Time in which nothing was ready is
// lost, as on a real link.
class Link {
 public:
  // How far in the past a slot may start. After a longer stall the link does not run hot to make
  // up for all of it.
  static constexpr std::int64_t kCatchUpNs = 20'000'000;

  // 0 bytes per second: no limit, slots take no time.
  explicit Link(std::uint64_t bytes_per_s) : bytes_per_s_(bytes_per_s) {}

  bool is_limited() const { return bytes_per_s_ > 0; }
  // When the next slot may be granted.
  std::int64_t free_at() const { return free_at_; }
  // The slot of `bytes` that have been ready since `ready_ns`.
  Slot grant(std::int64_t ready_ns, std::int64_t now_ns, std::size_t bytes);

 private:
  std::uint64_t bytes_per_s_;
  std::int64_t free_at_ = 0;
  double rest_ns_ = 0;  // what rounding to nanoseconds has left
};

}  // namespace aegaeon::copy

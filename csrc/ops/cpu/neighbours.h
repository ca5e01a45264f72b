// Which instances of a node compute at this moment, so that those that do share its processors: a
// byte of shared memory for each.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "shm/region.h"

namespace aegaeon::ops {

constexpr std::size_t kSeats = 64;

class Neighbours {
 public:
  // Joins those at `path`, or makes their region. What a process that died at this seat has left is
  // cleared; until then it counts as one that computes. Raises RegionError, RegionMismatch.
  Neighbours(const std::string& path, std::size_t seat);
  ~Neighbours() { end(); }
  Neighbours(const Neighbours&) = delete;
  Neighbours& operator=(const Neighbours&) = delete;

  void begin() { seat_->store(1, std::memory_order_relaxed); }
  void end() { seat_->store(0, std::memory_order_relaxed); }

  // How many compute. Whatever is there, it is at most kSeats: a wrong count costs time alone.
  unsigned computing() const;

 private:
  using Seats = std::array<std::atomic<std::uint8_t>, kSeats>;

  shm::Region region_;
  Seats* seats_;
  std::atomic<std::uint8_t>* seat_;
};

}  // namespace aegaeon::ops

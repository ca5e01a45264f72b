#include "ops/cpu/neighbours.h"

#include "shm/errors.h"

namespace aegaeon::ops {
namespace {

constexpr auto kKind = shm::RegionKind::neighbours;

shm::Region join(const std::string& path) {
  if (!shm::region_exists(path)) {
    try {
      return shm::Region::create(path, kKind, {kSeats, 0}, kSeats, [](std::byte*) {});
    } catch (const shm::RegionError&) {
      if (!shm::region_exists(path)) throw;  // else another process was faster
    }
  }
  shm::Region region = shm::Region::attach(path, kKind);
  if (region.body_bytes() < kSeats) {
    throw shm::RegionMismatch(path + " has no room for " + std::to_string(kSeats) +
                              " instances; remove the file");
  }
  return region;
}

}  // namespace

Neighbours::Neighbours(const std::string& path, std::size_t seat)
    : region_(join(path)), seats_(reinterpret_cast<Seats*>(region_.body())) {
  seat_ = &seats_->at(seat % kSeats);  // beyond it two share a seat, and count as one
  end();
}

unsigned Neighbours::computing() const {
  unsigned count = 0;
  for (const auto& seat : *seats_) count += seat.load(std::memory_order_relaxed) != 0;
  return count;
}

}  // namespace aegaeon::ops

// Which addresses are a device's, which the device may reach in the host, and which it may not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace aegaeon::cuda {

enum class Place : std::uint8_t { pageable, pinned, device };

// Used from any thread. Ranges of it do not overlap.
class Places {
 public:
  ~Places();

  // A device's memory, its own or another process's.
  void add_device(const void* base, std::size_t bytes);
  void remove_device(const void* base);
  // Page-locks whole pages of the host's memory, so that copies need no stage. False where the
  // system or the driver refuses, or part of them is locked already: copies go through a stage
  // then.
  bool pin(void* base, std::size_t bytes);
  // Before that memory is unmapped; no copy may be under way there. Nothing where it is not locked.
  void unpin(void* base);

  // Raises copy::CopyError for a range that is a device's in part.
  Place of(const void* address, std::size_t bytes) const;

 private:
  struct Range {
    std::size_t bytes;
    Place place;
  };
  using Ranges = std::map<std::uintptr_t, Range>;

  bool has_overlap(std::uintptr_t begin, std::size_t bytes) const;
  bool remove(const void* base, Place place);

  std::mutex pinning_;  // over what is locked and unlocked, taken before the other one
  mutable std::mutex mutex_;
  Ranges ranges_;  // by where they begin
};

}  // namespace aegaeon::cuda

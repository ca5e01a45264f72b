// Which addresses are a device's, which the device may reach in the host, and which it may not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>

namespace aegaeon::cuda {

enum class Place : std::uint8_t { pageable, pinned, device };

// Bytes that are one after another in one place.
struct Reach {
  Place place;
  std::size_t bytes;
};

// Whether what is being locked is still wanted.
using Wanted = std::function<bool()>;

// Locking this much takes a third of a second: who waits for it waits no longer.
constexpr std::size_t kPinPieceBytes = std::size_t{1} << 30;

// Used from any thread. Ranges of it do not overlap.
class Places {
 public:
  ~Places();

  // A device's memory, its own or another process's.
  void add_device(const void* base, std::size_t bytes);
  void remove_device(const void* base);
  // Page-locks whole pages of the host's memory by `flags` of cudaHostRegister, so that copies need
  // no stage. Returns why not, where the system or the driver refuses, part of them is locked
  // already, or it is not wanted any more: asked before each kPinPieceBytes. Nothing is locked
  // then, and copies go through a stage. Raises Lost.
  std::string pin(void* base, std::size_t bytes, unsigned flags, const Wanted& is_wanted);
  // Before that memory is unmapped; no copy may be under way there, and no pin. Nothing where it is
  // not locked.
  void unpin(void* base);

  // Where `address` is, and how many of the `bytes` from there on the device reaches alike: it
  // takes no copy across a border between pieces that were locked one by one. Raises
  // copy::CopyError where only part of the bytes is a device's.
  Reach reach(const void* address, std::size_t bytes) const;

 private:
  struct Range {
    std::size_t bytes;
    Place place;
    std::uintptr_t whole;  // where what was added begins, of which this is a piece
  };
  using Ranges = std::map<std::uintptr_t, Range>;

  bool has_overlap(std::uintptr_t begin, std::size_t bytes) const;
  void enter_pieces(std::uintptr_t begin, std::size_t bytes);

  mutable std::mutex mutex_;
  Ranges ranges_;  // by where they begin
};

}  // namespace aegaeon::cuda

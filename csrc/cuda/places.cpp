#include "cuda/places.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

#include "copy/errors.h"
#include "cuda/runtime.h"
#include "cuda/sticky.h"

namespace aegaeon::cuda {
namespace {

std::uintptr_t address_of(const void* place) { return reinterpret_cast<std::uintptr_t>(place); }

void unregister(std::uintptr_t base) {
  if (cudaHostUnregister(reinterpret_cast<void*>(base)) != cudaSuccess) cudaGetLastError();
}

// Pieces that are locked; unlocked again unless they are kept.
class Locked {
 public:
  Locked() = default;
  ~Locked() {
    for (const std::uintptr_t piece : pieces_) unregister(piece);
  }
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;

  // Returns why not.
  std::string add(std::uintptr_t base, std::size_t bytes, unsigned flags) {
    const cudaError_t result = cudaHostRegister(reinterpret_cast<void*>(base), bytes, flags);
    if (result == cudaSuccess) {
      pieces_.push_back(base);
      return {};
    }
    cudaGetLastError();  // so that nobody takes it for the failure of a later call
    if (is_sticky(result)) check(result, "lock memory");
    return "the driver refuses: " + told(result);
  }
  void keep() { pieces_.clear(); }

 private:
  std::vector<std::uintptr_t> pieces_;
};

std::string lock_pieces(std::uintptr_t begin, std::size_t bytes, unsigned flags,
                        const Wanted& is_wanted) {
  Locked locked;
  for (std::size_t at = 0; at < bytes; at += kPinPieceBytes) {
    if (is_wanted && !is_wanted()) return "it is not wanted any more";
    std::string refusal = locked.add(begin + at, std::min(bytes - at, kPinPieceBytes), flags);
    if (!refusal.empty()) return refusal;
  }
  locked.keep();
  return {};
}

}  // namespace

Places::~Places() {
  for (const auto& [begin, range] : ranges_) {
    if (range.place == Place::pinned) unregister(begin);
  }
}

void Places::add_device(const void* base, std::size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ranges_[address_of(base)] = {bytes, Place::device, address_of(base)};
}

void Places::remove_device(const void* base) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ranges_.erase(address_of(base));
}

// Meanwhile copies go on: for them it is pageable until all of it is locked, for nothing may be
// under way where a lock is undone.
std::string Places::pin(void* base, std::size_t bytes, unsigned flags, const Wanted& is_wanted) {
  const std::uintptr_t begin = address_of(base);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (bytes == 0 || has_overlap(begin, bytes)) return "part of it is locked already";
    ranges_[begin] = {bytes, Place::pageable, begin};
  }
  std::string refusal;
  try {
    refusal = lock_pieces(begin, bytes, flags, is_wanted);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ranges_.erase(begin);
    throw;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  ranges_.erase(begin);
  if (refusal.empty()) enter_pieces(begin, bytes);
  return refusal;
}

void Places::enter_pieces(std::uintptr_t begin, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += kPinPieceBytes) {
    ranges_[begin + at] = {std::min(bytes - at, kPinPieceBytes), Place::pinned, begin};
  }
}

void Places::unpin(void* base) {
  const std::uintptr_t begin = address_of(base);
  std::vector<std::uintptr_t> pieces;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto piece = ranges_.find(begin);
    while (piece != ranges_.end() && piece->second.place == Place::pinned &&
           piece->second.whole == begin) {
      pieces.push_back(piece->first);
      piece = ranges_.erase(piece);
    }
  }
  for (const std::uintptr_t piece : pieces) unregister(piece);
}

Reach Places::reach(const void* address, std::size_t bytes) const {
  const std::uintptr_t begin = address_of(address);
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto next = ranges_.upper_bound(begin);
  Reach found{Place::pageable, bytes};
  if (next != ranges_.end()) found.bytes = std::min(bytes, next->first - begin);
  if (next != ranges_.begin()) {
    const auto& [start, range] = *std::prev(next);
    if (begin - start < range.bytes) {
      found = {range.place, std::min(bytes, range.bytes - (begin - start))};
    }
  }
  if (found.place == Place::device) {
    if (found.bytes < bytes) {
      throw copy::CopyError("a copy of " + std::to_string(bytes) +
                            " bytes goes beyond the device's memory");
    }
    return found;
  }
  for (auto other = next; other != ranges_.end() && other->first - begin < bytes; ++other) {
    if (other->second.place != Place::device) continue;
    throw copy::CopyError("a copy of " + std::to_string(bytes) +
                          " bytes runs into the device's memory");
  }
  return found;
}

bool Places::has_overlap(std::uintptr_t begin, std::size_t bytes) const {
  const auto next = ranges_.upper_bound(begin);
  if (next != ranges_.end() && next->first - begin < bytes) return true;
  return next != ranges_.begin() && begin - std::prev(next)->first < std::prev(next)->second.bytes;
}

}  // namespace aegaeon::cuda

#include "cuda/places.h"

#include <cuda_runtime_api.h>

#include <iterator>
#include <string>

#include "copy/errors.h"

namespace aegaeon::cuda {
namespace {

std::uintptr_t address_of(const void* place) { return reinterpret_cast<std::uintptr_t>(place); }

}  // namespace

Places::~Places() {
  for (const auto& [begin, range] : ranges_) {
    if (range.place == Place::pinned) cudaHostUnregister(reinterpret_cast<void*>(begin));
  }
}

void Places::add_device(const void* base, std::size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ranges_[address_of(base)] = {bytes, Place::device};
}

void Places::remove_device(const void* base) {
  const std::lock_guard<std::mutex> lock(mutex_);
  remove(base, Place::device);
}

// Locking a gigabyte takes a while, in which copies go on: nobody finds it here before it is
// locked.
bool Places::pin(void* base, std::size_t bytes) {
  const std::lock_guard<std::mutex> pinning(pinning_);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (bytes == 0 || has_overlap(address_of(base), bytes)) return false;
  }
  if (cudaHostRegister(base, bytes, cudaHostRegisterPortable) != cudaSuccess) {
    cudaGetLastError();  // so that nobody takes it for the failure of a later call
    return false;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  ranges_[address_of(base)] = {bytes, Place::pinned};
  return true;
}

void Places::unpin(void* base) {
  const std::lock_guard<std::mutex> pinning(pinning_);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!remove(base, Place::pinned)) return;
  }
  if (cudaHostUnregister(base) != cudaSuccess) cudaGetLastError();
}

Place Places::of(const void* address, std::size_t bytes) const {
  const std::uintptr_t begin = address_of(address);
  const std::lock_guard<std::mutex> lock(mutex_);
  auto next = ranges_.upper_bound(begin);
  if (next != ranges_.begin()) {
    const auto& [start, range] = *std::prev(next);
    if (begin - start < range.bytes) {
      if (bytes <= range.bytes - (begin - start)) return range.place;
      if (range.place == Place::device) {
        throw copy::CopyError("a copy of " + std::to_string(bytes) +
                              " bytes goes beyond the device's memory");
      }
    }
  }
  if (next != ranges_.end() && next->second.place == Place::device && next->first - begin < bytes) {
    throw copy::CopyError("a copy of " + std::to_string(bytes) +
                          " bytes runs into the device's memory");
  }
  return Place::pageable;
}

bool Places::has_overlap(std::uintptr_t begin, std::size_t bytes) const {
  const auto next = ranges_.upper_bound(begin);
  if (next != ranges_.end() && next->first - begin < bytes) return true;
  return next != ranges_.begin() && begin - std::prev(next)->first < std::prev(next)->second.bytes;
}

bool Places::remove(const void* base, Place place) {
  const auto found = ranges_.find(address_of(base));
  if (found == ranges_.end() || found->second.place != place) return false;
  ranges_.erase(found);
  return true;
}

}  // namespace aegaeon::cuda

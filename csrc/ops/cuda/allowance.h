// Which kernels may have more shared memory than a block has unasked: the driver keeps that for
// each device and kernel, so it is told once and not at every launch. Needs no toolkit.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <utility>

namespace aegaeon::ops::cuda {

class Allowance {
 public:
  // Calls `allow` unless the kernel was allowed as much on the device before; where that throws, it
  // was not. For any thread.
  template <typename Allow>
  void at_least(int device, const void* kernel, std::size_t bytes, const Allow& allow) {
    const std::lock_guard<std::mutex> held(mutex_);
    std::size_t& allowed = bytes_[{device, kernel}];
    if (bytes <= allowed) return;
    allow();
    allowed = bytes;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<int, const void*>, std::size_t> bytes_;
};

}  // namespace aegaeon::ops::cuda

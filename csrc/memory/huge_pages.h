// Files mapped where huge pages can be: so that one entry of a page table stands for 512.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif

namespace aegaeon::memory {

constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

constexpr std::uint64_t whole_huge_pages(std::uint64_t bytes) {
  return bytes / kHugePageBytes * kHugePageBytes;
}

// The first `bytes` of a file, shared, at a multiple of kHugePageBytes; unmapped at the end.
class HugeMapping {
 public:
  HugeMapping() = default;
  // address() is null, and errno says why, when it cannot be mapped.
  HugeMapping(int file, std::size_t bytes, int protection);
  HugeMapping(HugeMapping&& other) noexcept
      : address_(std::exchange(other.address_, nullptr)), bytes_(other.bytes_) {}
  HugeMapping& operator=(HugeMapping&& other) noexcept {
    std::swap(address_, other.address_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~HugeMapping() {
    if (address_ != nullptr) munmap(address_, bytes_);
  }

  std::byte* address() const { return address_; }

 private:
  std::byte* address_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace aegaeon::memory

#include "memory/huge_pages.h"

#include <cstdint>

namespace aegaeon::memory {

// Room for it wherever it begins is reserved, mapped over, and what is too much given back.
HugeMapping::HugeMapping(int file, std::size_t bytes, int protection) : bytes_(bytes) {
  const std::size_t reserved = bytes + kHugePageBytes;
  void* base =
      mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    return;
  }
  auto* const begin = static_cast<std::byte*>(base);
  const std::size_t before = -reinterpret_cast<std::uintptr_t>(begin) % kHugePageBytes;
  void* mapped = mmap(begin + before, bytes, protection, MAP_SHARED | MAP_FIXED, file, 0);
  if (mapped == MAP_FAILED) {
    munmap(begin, reserved);
    return;
  }
  if (before > 0) munmap(begin, before);
  std::byte* const end = begin + before + (bytes + 4095) / 4096 * 4096;
  munmap(end, static_cast<std::size_t>(begin + reserved - end));
  address_ = static_cast<std::byte*>(mapped);
}

}  // namespace aegaeon::memory

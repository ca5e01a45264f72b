#include "ops/cpu/workspace.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace aegaeon::ops {
namespace {

constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;
constexpr std::size_t kPageBytes = std::size_t{4} << 10;

}  // namespace

Workspace::~Workspace() { release(); }

float* Workspace::reserve(std::size_t floats) {
  const std::size_t needed = floats * sizeof(float);
  if (needed <= bytes_) return memory_;
  // Never both at once: a pass counts its own memory only.
  release();
  const std::size_t unit = needed < kHugePageBytes ? kPageBytes : kHugePageBytes;
  const std::size_t bytes = (needed + unit - 1) / unit * unit;
  void* const memory = std::aligned_alloc(unit, bytes);
  if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  // Where the system has none to give, small ones do.
  if (unit == kHugePageBytes) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  memory_ = static_cast<float*>(memory);
  bytes_ = bytes;
  return memory_;
}

void Workspace::release() {
  std::free(memory_);
  memory_ = nullptr;
  bytes_ = 0;
}

}  // namespace aegaeon::ops

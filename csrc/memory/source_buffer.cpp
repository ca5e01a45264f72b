#include "memory/source_buffer.h"

#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "memory/huge_pages.h"
#include "memory/source_file.h"
#include "memory/weight_cache.h"

namespace aegaeon::memory {
namespace {

constexpr std::size_t kUsualBytes = kChunkBytes + 2 * kDirectAlignment;
constexpr std::size_t kMostKept = 8;

struct Kept {
  std::mutex mutex;
  std::vector<AlignedMemory> buffers;
};

// Never destroyed: a process may exit while its readers run.
Kept& kept() {
  static Kept& kept = *new Kept();
  return kept;
}

// The kernel pins what a direct read fills, page by page: huge ones are a tenth of that work.
// Where it has none, that is no failure.
AlignedMemory huge_memory(std::size_t bytes) {
  const std::size_t alignment = bytes < kHugePageBytes / 2 ? kDirectAlignment : kHugePageBytes;
  AlignedMemory memory = aligned_memory(bytes, alignment);
  if (alignment == kHugePageBytes) {
    madvise(memory.get(), bytes, MADV_HUGEPAGE);
  }
  return memory;
}

}  // namespace

AlignedMemory aligned_memory(std::size_t bytes, std::size_t alignment) {
  const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  auto* memory = static_cast<std::byte*>(std::aligned_alloc(alignment, rounded));
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return AlignedMemory(memory);
}

SourceBuffer::SourceBuffer(std::size_t bytes)
    : is_usual_(bytes <= kUsualBytes && bytes > kUsualBytes / 2) {
  if (is_usual_) {
    const std::lock_guard<std::mutex> held(kept().mutex);
    if (!kept().buffers.empty()) {
      memory_ = std::move(kept().buffers.back());
      kept().buffers.pop_back();
    }
  }
  if (!memory_) memory_ = huge_memory(is_usual_ ? kUsualBytes : bytes);
}

SourceBuffer::~SourceBuffer() {
  const std::lock_guard<std::mutex> held(kept().mutex);
  if (is_usual_ && kept().buffers.size() < kMostKept) {
    kept().buffers.push_back(std::move(memory_));
  }
}

}  // namespace aegaeon::memory

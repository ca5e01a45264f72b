// What chunks of files are read into.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>

namespace aegaeon::memory {

struct FreeMemory {
  void operator()(std::byte* memory) const { std::free(memory); }
};
using AlignedMemory = std::unique_ptr<std::byte, FreeMemory>;

// Throws std::bad_alloc.
AlignedMemory aligned_memory(std::size_t bytes, std::size_t alignment);

// Memory for direct reads, of one thread. Some buffers of the usual length are kept for the next
// load: fresh ones have to be zeroed, and a virtual machine may have to ask its host for them, at
// milliseconds for a huge page.
class SourceBuffer {
 public:
  // Throws std::bad_alloc.
  explicit SourceBuffer(std::size_t bytes);
  SourceBuffer(const SourceBuffer&) = delete;
  SourceBuffer& operator=(const SourceBuffer&) = delete;
  ~SourceBuffer();

  std::byte* get() const { return memory_.get(); }

 private:
  bool is_usual_;
  AlignedMemory memory_;
};

}  // namespace aegaeon::memory

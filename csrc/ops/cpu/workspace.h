// Where the activations of a pass lie.
#pragma once

#include <cstddef>

namespace aegaeon::ops {

// Memory of one pass at a time, kept as large as any of them needed it: fresh memory would cost a
// page fault for each 4 KiB of every pass. aegaeon/memory/workspace.py counts what it comes to.
class Workspace {
 public:
  Workspace() = default;
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // `floats` of them, 64-byte aligned. What is there stays unless the memory has to grow. Throws
  // std::bad_alloc.
  float* reserve(std::size_t floats);

  std::size_t bytes() const { return bytes_; }

 private:
  void release();

  float* memory_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace aegaeon::ops

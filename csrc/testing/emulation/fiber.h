// A stack of its own that code runs on until it gives way: what a CUDA thread is in the emulation.
// The sanitizers are told of each switch, and that a switch orders nothing.
#pragma once

#include <cstddef>

namespace aegaeon::emulation {

class Fiber {
 public:
  // At its first turn the fiber calls body(context), which never returns.
  Fiber(void (*body)(void*), void* context);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Called on the thread's own stack: runs the fiber until it gives way.
  void resume();
  // Called on the fiber: goes on where it was resumed.
  void give_way();

 private:
  static void enter();

  void (*body_)(void*);
  void* context_;
  char* memory_;
  void* stack_ = nullptr;   // its own pointer while it does not run
  void* caller_ = nullptr;  // that of who resumed it
  void* identity_ = nullptr;
  void* callers_identity_ = nullptr;
  const void* callers_bottom_ = nullptr;
  std::size_t callers_bytes_ = 0;
};

// Order for the thread sanitizer: what came before a release comes before what follows an acquire
// of the same place.
void release_order(void* place);
void acquire_order(void* place);

}  // namespace aegaeon::emulation

// Tells the thread sanitizer who is ordered with whom: each stream is a thread of its own (a fiber
// in its words), ordered only by what CUDA promises. Nothing without that sanitizer.
#pragma once

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>

extern "C" {
void AnnotateIgnoreSyncBegin(const char* file, int line);
void AnnotateIgnoreSyncEnd(const char* file, int line);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace cudart::races {

// From here to leave(): the stand-in's own lock and bookkeeping order nobody, and are no races.
inline void enter() {
  AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
inline void leave() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
}

// The calling thread, between enter() and leave(): what it did so far happens before `tag`.
inline void give(void* tag) {
  AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
  __tsan_release(tag);
  AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
}
// What happened before `tag` happens before what it does from now on.
inline void take(void* tag) {
  AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
  __tsan_acquire(tag);
  AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
}

inline void* new_fiber() {
  void* fiber = __tsan_create_fiber(0);
  __tsan_set_fiber_name(fiber, "cuda stream");
  return fiber;
}

// The calling thread is `fiber` until the end of the scope.
class Fiber {
 public:
  explicit Fiber(void* fiber) : before_(__tsan_get_current_fiber()) {
    __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
  }
  ~Fiber() { __tsan_switch_to_fiber(before_, __tsan_switch_to_fiber_no_sync); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void give(void* tag) { __tsan_release(tag); }
  void take(void* tag) { __tsan_acquire(tag); }

 private:
  void* before_;
};

}  // namespace cudart::races

#else

namespace cudart::races {

inline void enter() {}
inline void leave() {}
inline void give(void*) {}
inline void take(void*) {}
inline void* new_fiber() { return nullptr; }

struct Fiber {
  explicit Fiber(void*) {}
  void give(void*) {}
  void take(void*) {}
};

}  // namespace cudart::races

#endif

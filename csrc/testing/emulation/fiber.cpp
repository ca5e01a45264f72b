// Not to be compiled under a sanitizer, which cannot follow a switch from inside:
// AEGAEON_FIBERS_THREAD or _ADDRESS names the one that the program is linked with, to be told.

#include "testing/emulation/fiber.h"

#include <sys/mman.h>

#include <new>

#if defined(AEGAEON_FIBERS_THREAD)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* place);
void __tsan_release(void* place);
}
#elif defined(AEGAEON_FIBERS_ADDRESS)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake, const void* bottom, std::size_t bytes);
void __sanitizer_finish_switch_fiber(void* fake, const void** bottom, std::size_t* bytes);
}
#endif

#if defined(__x86_64__)
// Saves what a function must keep, and takes up another stack where it did the same.
__asm__(
    ".text\n"
    ".type aegaeon_switch_stack,@function\n"
    "aegaeon_switch_stack:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n"
    ".size aegaeon_switch_stack,.-aegaeon_switch_stack\n");
extern "C" void aegaeon_switch_stack(void** saved, void* taken);
#else
#include <ucontext.h>
#endif

namespace aegaeon::emulation {
namespace {

constexpr std::size_t kGuardBytes = 64 << 10;  // a page of any system
#if defined(AEGAEON_FIBERS_THREAD) || defined(AEGAEON_FIBERS_ADDRESS)
constexpr std::size_t kStackBytes = 256 << 10;
#else
constexpr std::size_t kStackBytes = 64 << 10;
#endif

thread_local Fiber* entering = nullptr;

#if defined(__x86_64__)
// A stack as aegaeon_switch_stack leaves one, that returns into `entry`.
void* prepare(char* bottom, void (*entry)()) {
  void** top = reinterpret_cast<void**>(bottom + kStackBytes);
  *--top = nullptr;  // the caller of `entry`: keeps the stack aligned, and ends back traces
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  return top;
}

void switch_stack(void** saved, void* taken) { aegaeon_switch_stack(saved, taken); }
#else
void* prepare(char* bottom, void (*entry)()) {
  auto* const context = new ucontext_t;
  getcontext(context);
  context->uc_stack = {bottom, 0, kStackBytes};
  makecontext(context, entry, 0);
  return context;
}

void switch_stack(void** saved, void* taken) {
  ucontext_t own;
  *saved = &own;
  swapcontext(&own, static_cast<ucontext_t*>(taken));
}
#endif

}  // namespace

Fiber::Fiber(void (*body)(void*), void* context) : body_(body), context_(context) {
  void* const memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  mprotect(memory_, kGuardBytes, PROT_NONE);
  stack_ = prepare(memory_ + kGuardBytes, &Fiber::enter);
#if defined(AEGAEON_FIBERS_THREAD)
  identity_ = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
#if defined(AEGAEON_FIBERS_THREAD)
  __tsan_destroy_fiber(identity_);
#endif
  munmap(memory_, kGuardBytes + kStackBytes);
}

void Fiber::enter() {
  Fiber* const self = entering;
#if defined(AEGAEON_FIBERS_ADDRESS)
  __sanitizer_finish_switch_fiber(nullptr, &self->callers_bottom_, &self->callers_bytes_);
#endif
  self->body_(self->context_);
}

void Fiber::resume() {
  entering = this;
#if defined(AEGAEON_FIBERS_THREAD)
  callers_identity_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(identity_, 1);
#elif defined(AEGAEON_FIBERS_ADDRESS)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, memory_ + kGuardBytes, kStackBytes);
#endif
  switch_stack(&caller_, stack_);
#if defined(AEGAEON_FIBERS_ADDRESS)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void Fiber::give_way() {
#if defined(AEGAEON_FIBERS_THREAD)
  __tsan_switch_to_fiber(callers_identity_, 1);
#elif defined(AEGAEON_FIBERS_ADDRESS)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, callers_bottom_, callers_bytes_);
#endif
  switch_stack(&stack_, caller_);
#if defined(AEGAEON_FIBERS_ADDRESS)
  __sanitizer_finish_switch_fiber(fake, &callers_bottom_, &callers_bytes_);
#endif
}

void release_order([[maybe_unused]] void* place) {
#if defined(AEGAEON_FIBERS_THREAD)
  __tsan_release(place);
#endif
}

void acquire_order([[maybe_unused]] void* place) {
#if defined(AEGAEON_FIBERS_THREAD)
  __tsan_acquire(place);
#endif
}

}  // namespace aegaeon::emulation

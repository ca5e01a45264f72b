// Sleeping on a word of shared memory, and the clock that all leases and deadlines use.
#pragma once

#include <atomic>
#include <cstdint>

namespace aegaeon::shm {

constexpr std::int64_t kMillisecond = 1'000'000;
constexpr std::int64_t kSecond = 1'000'000'000;

// CLOCK_MONOTONIC in nanoseconds: the same for all processes of a node and for Python's
// time.monotonic. It stands still while the machine is suspended, as do those who renew leases.
std::int64_t now_ns();

// Sleeps while `word` is `expected`, up to `timeout_ns`, until a wake-up or a signal. May return
// early for no reason: callers look again.
void futex_wait(const std::atomic<std::uint32_t>& word, std::uint32_t expected,
                std::int64_t timeout_ns);

// Wakes up to `count` sleepers, in any process.
void futex_wake(const std::atomic<std::uint32_t>& word, int count);

// Tells the processor that this is a spin loop.
inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace aegaeon::shm

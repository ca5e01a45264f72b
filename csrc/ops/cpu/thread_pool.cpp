#include "ops/cpu/thread_pool.h"

#include <algorithm>
#include <climits>
#include <utility>

#include "shm/futex.h"

namespace aegaeon::ops {
namespace {

constexpr std::uint32_t kActive = 0xFFF;
constexpr std::uint32_t kOpen = 0x1000;
constexpr std::uint32_t kJob = 0x2000;
constexpr unsigned kMaxThreads = kActive;

// Between two operators of a step lie some tens of microseconds, less than it takes to wake a
// sleeper; beyond that a spinning thread only takes the processor from others.
constexpr std::int64_t kSpinNs = 50'000;
constexpr int kSpinsPerLook = 32;
constexpr std::int64_t kSleepNs = 60 * shm::kSecond;

// Waits actively until `ready()`; false when the time for that is over.
template <typename Ready>
bool spin_until(const Ready& ready) {
  const std::int64_t end = shm::now_ns() + kSpinNs;
  do {
    for (int spin = 0; spin < kSpinsPerLook; ++spin) {
      if (ready()) return true;
      shm::relax();
    }
  } while (shm::now_ns() < end);
  return ready();
}

bool is_new(std::uint32_t state, std::uint32_t served) {
  return (state & kOpen) != 0 && (state & ~(kOpen | kActive)) != served;
}

}  // namespace

ThreadPool::ThreadPool(unsigned threads, std::unique_ptr<Neighbours> neighbours)
    : share_(std::min(threads, kMaxThreads)), neighbours_(std::move(neighbours)) {
  const unsigned count = share_.load();
  try {
    for (unsigned worker = 1; worker < count; ++worker) {
      workers_.emplace_back([this, worker] { serve(worker); });
    }
  } catch (...) {  // the system gives no more threads; those that run must not be left behind
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stopping_.store(true);
  state_.fetch_add(kJob);  // a new value, so that nobody falls asleep over the old one
  shm::futex_wake(state_, INT_MAX);
  share_.store(kMaxThreads + 1);
  shm::futex_wake(share_, INT_MAX);
  for (std::thread& worker : workers_) {
    worker.join();
  }
}

// Returns how many threads take part in the next job, the caller among them. Those beyond sleep: a
// worker that takes a processor from a neighbour's caller makes two steps slower for one.
unsigned ThreadPool::share_out() {
  const unsigned computing = std::max(1U, neighbours_->computing());
  const unsigned share = std::max(1U, threads() / computing);
  // Every worker looks at it: a write, even of the same, would take its line from all of them.
  const unsigned before = share_.load();
  if (share != before) share_.store(share);
  if (share > before) shm::futex_wake(share_, INT_MAX);
  return share;
}

void ThreadPool::open() {
  state_.store(((state_.load() & ~(kOpen | kActive)) + kJob) | kOpen);
  if (sleepers_.load() != 0) {
    shm::futex_wake(state_, INT_MAX);
  }
}

void ThreadPool::close() {
  state_.fetch_and(~kOpen);
  const auto is_alone = [this] { return (state_.load() & kActive) == 0; };
  if (spin_until(is_alone)) return;
  caller_sleeps_.store(true);
  for (std::uint32_t state; ((state = state_.load()) & kActive) != 0;) {
    shm::futex_wait(state_, state, kSleepNs);
  }
  caller_sleeps_.store(false);
}

void ThreadPool::serve(unsigned worker) {
  std::uint32_t served = 0;
  while (!stopping_.load()) {
    if (worker >= share_.load()) {
      wait_for_share(worker);
    } else if (enter(served)) {
      call_(context_);
      leave();
    } else {
      wait_for_work(served);
    }
  }
}

// Joins the open job unless `served` names it, which then does.
bool ThreadPool::enter(std::uint32_t& served) {
  std::uint32_t state = state_.load();
  while (is_new(state, served)) {
    if (state_.compare_exchange_weak(state, state + 1)) {
      served = state & ~(kOpen | kActive);
      return true;
    }
  }
  return false;
}

void ThreadPool::leave() {
  state_.fetch_sub(1);
  if (caller_sleeps_.load()) {
    shm::futex_wake(state_, INT_MAX);
  }
}

void ThreadPool::wait_for_share(unsigned worker) {
  const std::uint32_t share = share_.load();
  if (!stopping_.load() && worker >= share) {
    shm::futex_wait(share_, share, kSleepNs);
  }
}

void ThreadPool::wait_for_work(std::uint32_t served) {
  const auto is_called = [&] { return stopping_.load() || is_new(state_.load(), served); };
  if (spin_until(is_called)) return;
  sleepers_.fetch_add(1);
  const std::uint32_t state = state_.load();
  if (!stopping_.load() && !is_new(state, served)) {
    shm::futex_wait(state_, state, kSleepNs);
  }
  sleepers_.fetch_sub(1);
}

}  // namespace aegaeon::ops

// A fork-join pool: the caller and its workers do one piece of work together, then wait for more.
// Threads do not survive fork(): a child makes a pool of its own and leaves its parent's alone.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "ops/cpu/neighbours.h"

namespace aegaeon::ops {

class ThreadPool {
 public:
  // The caller of `run` counts as one of `threads`, at least 1. They are shared out among the
  // `neighbours` that compute, if those are given: each has its part of as many, and at least one.
  // Throws std::system_error when the system does not give as many.
  explicit ThreadPool(unsigned threads, std::unique_ptr<Neighbours> neighbours = nullptr);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  unsigned threads() const { return static_cast<unsigned>(workers_.size()) + 1; }

  // While it lives, this pool computes in its neighbours' eyes.
  class Computing {
   public:
    explicit Computing(const ThreadPool& pool) : neighbours_(pool.neighbours_.get()) {
      if (neighbours_ != nullptr) neighbours_->begin();
    }
    ~Computing() {
      if (neighbours_ != nullptr) neighbours_->end();
    }
    Computing(const Computing&) = delete;
    Computing& operator=(const Computing&) = delete;

   private:
    Neighbours* neighbours_;
  };

  // Calls `work()` here and on every worker that comes in time; returns when all calls have. So
  // `work` claims its share itself and leaves none behind: a worker that the system keeps from
  // running is not waited for. Throws what a call of `work` threw first, when all have ended; the
  // others are not told to stop. Callers take turns.
  template <typename Work>
  void run(const Work& work) {
    if (workers_.empty()) {
      work();
      return;
    }
    const std::lock_guard<std::mutex> turn(turn_);
    if (neighbours_ != nullptr && share_out() == 1) {
      work();
      return;
    }
    Job<Work> job{work};
    call_ = [](void* context) { (*static_cast<Job<Work>*>(context))(); };
    context_ = &job;
    open();
    job();
    close();
    if (job.failure) std::rethrow_exception(job.failure);
  }

  // Calls `work(first, last)` for ranges that together are 0 .. count, of at most `grain` items.
  template <typename Work>
  void for_ranges(std::size_t count, std::size_t grain, const Work& work) {
    if (workers_.empty() || count <= grain) {
      work(std::size_t{0}, count);
      return;
    }
    std::atomic<std::size_t> next{0};
    run([&] {
      for (std::size_t first; (first = next.fetch_add(grain)) < count;) {
        work(first, first + grain < count ? first + grain : count);
      }
    });
  }

  // The same in ranges that become shorter, half of what each thread's share of the rest is, down
  // to `least` items: few of them, and threads end together.
  template <typename Work>
  void for_tapering(std::size_t count, std::size_t least, const Work& work) {
    if (workers_.empty() || count <= least) {
      work(std::size_t{0}, count);
      return;
    }
    const std::size_t halves = 2 * std::size_t{threads()};
    std::atomic<std::size_t> next{0};
    run([&] {
      for (std::size_t first = next.load(); first < count;) {
        const std::size_t share = (count - first) / halves;
        const std::size_t last = std::min(count, first + std::max(least, share));
        if (!next.compare_exchange_weak(first, last)) continue;
        work(first, last);
        first = next.load();
      }
    });
  }

 private:
  // Work that throws nothing: workers have nobody to throw to, and the caller must close first.
  template <typename Work>
  struct Job {
    const Work& work;
    std::exception_ptr failure = nullptr;
    std::atomic<bool> has_failed{false};

    void operator()() noexcept {
      try {
        work();
      } catch (...) {
        if (!has_failed.exchange(true)) failure = std::current_exception();
      }
    }
  };

  void stop();
  unsigned share_out();
  void open();
  void close();
  void serve(unsigned worker);
  void wait_for_share(unsigned worker);
  bool enter(std::uint32_t& served);
  void leave();
  void wait_for_work(std::uint32_t served);

  std::mutex turn_;
  void (*call_)(void*) = nullptr;
  void* context_ = nullptr;
  // Jobs so far (upper bits), whether one may be entered, and how many workers are in it.
  alignas(64) std::atomic<std::uint32_t> state_{0};
  alignas(64) std::atomic<std::uint32_t> sleepers_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> stopping_{false};
  // Workers below it take part; moves only where there are neighbours.
  alignas(64) std::atomic<std::uint32_t> share_;
  std::unique_ptr<Neighbours> neighbours_;
  std::vector<std::thread> workers_;
};

}  // namespace aegaeon::ops

// The thread pool under the sanitizers, alone and with neighbours: `pool_stress`.

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "ops/cpu/neighbours.h"
#include "ops/cpu/thread_pool.h"
#include "testing/stress.h"

namespace {

using namespace aegaeon::ops;
using aegaeon::testing::require;

// Many short jobs from two callers, with pauses that let workers fall asleep.
void press(ThreadPool& pool) {
  const auto call = [&pool](unsigned seed) {
    std::mt19937 choose{seed};
    for (int job = 0; job < 3000; ++job) {
      std::vector<int> done(choose() % 50 + 1);
      pool.for_ranges(done.size(), choose() % 4 + 1, [&done](std::size_t from, std::size_t to) {
        for (std::size_t i = from; i < to; ++i) ++done[i];
      });
      require(std::all_of(done.begin(), done.end(), [](int n) { return n == 1; }),
              "an item was left out or done twice");
      if (job % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      const ThreadPool::Computing computing(pool);
    }
  };
  std::thread other(call, 1);
  call(2);
  other.join();
}

void press_pools() {
  ThreadPool alone{4};
  press(alone);
  for (int i = 0; i < 50; ++i) ThreadPool{3};  // stopped while they start
}

// The same, while neighbours begin and end to compute, so that workers come and go.
void press_neighbours() {
  const std::string path = "/dev/shm/aegaeon-neighbours." + std::to_string(::getpid());
  const auto join = [&path](std::size_t seat) { return std::make_unique<Neighbours>(path, seat); };
  {
    ThreadPool pool{4, join(0)};
    std::atomic<bool> is_over{false};
    std::thread beside([&] {
      const auto first = join(1), second = join(2);
      while (!is_over.load()) {
        first->begin();
        std::this_thread::sleep_for(std::chrono::microseconds(200));
        second->begin();
        require(pool.threads() == 4 && first->computing() >= 2, "who computes is not counted");
        first->end();
        std::this_thread::sleep_for(std::chrono::microseconds(200));
        second->end();
      }
    });
    press(pool);
    is_over = true;
    beside.join();
    require(join(3)->computing() == 0, "who has ended is counted");
  }
  ::unlink(path.c_str());
}

// What is thrown in one call, the caller's or a worker's, comes out of the pool, which serves on.
void throw_in_pool() {
  ThreadPool pool{3};
  for (std::size_t bad = 0; bad < 300; ++bad) {
    std::atomic<std::size_t> done{0};
    bool is_caught = false;
    try {
      pool.for_ranges(300, 1, [&](std::size_t first, std::size_t) {
        if (first == bad) throw std::bad_alloc();
        ++done;
      });
    } catch (const std::bad_alloc&) {
      is_caught = true;
    }
    require(is_caught, "what work has thrown is lost");
    done = 0;
    pool.for_ranges(300, 7, [&](std::size_t first, std::size_t last) { done += last - first; });
    require(done == 300, "a pool does not serve on after work has thrown");
  }
}

}  // namespace

int main() {
  press_pools();
  press_neighbours();
  throw_in_pool();
  std::printf("pool_stress: ok\n");
}

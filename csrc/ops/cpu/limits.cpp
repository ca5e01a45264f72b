#include "ops/limits.h"

#include <atomic>

#include "ops/cpu/kernel_choice.h"
#include "ops/cpu/thread_pool.h"
#include "shm/futex.h"

namespace aegaeon::ops {
namespace {

std::size_t on_all(ThreadPool& pool, std::size_t rounds, std::size_t (*work)(std::size_t)) {
  std::atomic<std::size_t> done{0};
  pool.for_ranges(pool.threads(), 1, [&](std::size_t first, std::size_t last) {
    for (; first < last; ++first) done += work(rounds);
  });
  return done;
}

}  // namespace

std::uint64_t read_words(ThreadPool& pool, const std::uint64_t* words, std::size_t count) {
  std::atomic<std::uint64_t> total{0};
  const std::size_t share = (count + pool.threads() - 1) / pool.threads();
  pool.for_ranges(count, share, [&](std::size_t first, std::size_t last) {
    std::uint64_t sum = 0;
    for (std::size_t i = first; i < last; ++i) sum += words[i];
    total += sum;
  });
  return total;
}

std::size_t multiply_add(ThreadPool& pool, std::size_t rounds) {
  return on_all(pool, rounds, multiply_adds_here);
}

std::size_t multiply_add_pairs(ThreadPool& pool, std::size_t rounds) {
  return on_all(pool, rounds, multiply_add_pairs_here);
}

void fork_join(ThreadPool& pool, std::size_t rounds) {
  const unsigned threads = pool.threads();
  for (std::size_t round = 0; round < rounds; ++round) {
    std::atomic<unsigned> here{0};
    pool.run([&] {
      ++here;
      while (here.load() < threads) shm::relax();
    });
  }
}

}  // namespace aegaeon::ops

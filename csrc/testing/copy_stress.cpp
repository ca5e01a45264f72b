// Threads that press the copy engine as hard as they can, for the sanitizers: `copy_stress`.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "copy/engine.h"
#include "copy/errors.h"
#include "copy/host.h"
#include "shm/futex.h"

namespace {

using namespace aegaeon::copy;
using aegaeon::shm::kSecond;

constexpr std::size_t kChunk = 4096;
constexpr std::size_t kBytes = 1 << 17;
constexpr std::uint64_t kFast = 20'000'000'000;

using Memory = std::vector<std::byte>;

void require(bool claim, const char* what) {
  if (!claim) {
    std::fprintf(stderr, "copy_stress: %s\n", what);
    std::exit(1);
  }
}

// The sanitizers see memcpy, and not the stores around the cache.
void copy_seen(std::byte* to, const std::byte* from, std::size_t bytes, bool) {
  std::memmove(to, from, bytes);
}

Order order_of(Memory& to, const Memory& from, unsigned priority) {
  Order order;
  order.priority = priority;
  // Odd cuts, and an empty one.
  for (std::size_t at = 0; at < from.size(); at += 10'007) {
    const std::size_t bytes = std::min<std::size_t>(10'007, from.size() - at);
    order.segments.push_back({to.data() + at, from.data() + at, bytes});
    order.segments.push_back({to.data(), from.data(), 0});
  }
  return order;
}

Memory pattern(unsigned seed) {
  Memory memory(kBytes);
  std::minstd_rand random(seed + 1);
  for (std::byte& byte : memory) byte = static_cast<std::byte>(random());
  return memory;
}

bool is_same(const Memory& left, const Memory& right, std::size_t bytes) {
  return std::memcmp(left.data(), right.data(), bytes) == 0;
}

// Without the lock that a wait takes: the progress alone must publish the bytes.
void poll(const Ticket& ticket, const Memory& target, const Memory& source) {
  for (std::size_t seen = 0; seen < kBytes; std::this_thread::yield()) {
    const std::size_t progress = ticket.progress_bytes.load(std::memory_order_acquire);
    require(progress >= seen, "progress fell");
    seen = progress;
    require(is_same(target, source, seen), "progress was not true");
  }
}

// A reader trusts the progress; a canceller overwrites what it has cancelled.
void use(Engine& engine, unsigned seed) {
  std::minstd_rand random(seed + 77);
  const Memory source = pattern(seed);
  Memory middle(kBytes), target(kBytes);
  for (int round = 0; round < 60; ++round) {
    const TicketPtr first = engine.submit(order_of(middle, source, random() % kPriorities));
    const TicketPtr second = engine.submit(order_of(target, middle, random() % 2), {first});
    if (round % 3 == 0) {
      engine.wait(*second, random() % kBytes, kSecond / 1000);
      engine.cancel(first);
      engine.cancel(second);
      std::fill(middle.begin(), middle.end(), std::byte{0});
      std::fill(target.begin(), target.end(), std::byte{0});
      continue;
    }
    engine.raise_priority(second, 0);
    if (round % 3 == 1) poll(*second, target, source);
    for (std::size_t bytes = 1; bytes < kBytes; bytes += random() % kBytes) {
      require(engine.wait(*second, bytes, 20 * kSecond), "a copy starved");
      require(is_same(target, source, bytes), "progress was not true");
    }
    require(engine.wait(*second, kBytes, 20 * kSecond), "a copy starved");
    require(is_same(target, source, kBytes), "a copy is wrong");
    std::fill(target.begin(), target.end(), std::byte{0});
  }
}

void stress(std::uint64_t link_bytes_per_s) {
  const auto engine = Engine::start({3, kChunk, link_bytes_per_s, true}, host_backend(copy_seen));
  std::vector<std::thread> users;
  for (unsigned seed = 0; seed < 3; ++seed) users.emplace_back([&, seed] { use(*engine, seed); });
  for (std::thread& user : users) user.join();
  require(engine->open_tickets() == 0, "tickets stayed open");
}

// close() races with those who submit, wait and cancel.
void stress_closing() {
  for (int round = 0; round < 30; ++round) {
    const auto engine = Engine::start({2, kChunk, 0, true}, host_backend(copy_seen));
    const Memory source = pattern(9);
    std::vector<Memory> targets(2, Memory(kBytes));
    std::atomic<int> started{0};
    std::vector<std::thread> users;
    for (Memory& target : targets) {
      users.emplace_back([&] {
        try {
          while (true) {
            const TicketPtr ticket = engine->submit(order_of(target, source, 1));
            started.fetch_add(1);
            require(engine->wait(*ticket, kBytes, 20 * kSecond) ||
                        ticket->outcome == Outcome::cancelled,
                    "a wait did not end with the engine");
          }
        } catch (const CopyError&) {
          return;  // closed
        }
      });
    }
    while (started.load() < 2 + round) std::this_thread::yield();
    engine->close();
    for (Memory& target : targets) std::fill(target.begin(), target.end(), std::byte{0});
    for (std::thread& user : users) user.join();
  }
}

// Each waits inside for the other.
void two_threads_share_one_copy() {
  std::atomic<int> inside{0};
  const auto meet = [&](std::byte*, const std::byte*, std::size_t, bool) {
    inside.fetch_add(1);
    const std::int64_t deadline = aegaeon::shm::now_ns() + 20 * kSecond;
    while (inside.load() < 2) {
      require(aegaeon::shm::now_ns() < deadline, "the second thread slept on");
      std::this_thread::yield();
    }
  };
  const auto engine = Engine::start({2, kChunk, 0, true}, host_backend(meet));
  const Memory source = pattern(2);
  Memory target(kBytes);
  for (int round = 0; round < 20; ++round) {  // in most, both slept before
    inside.store(0);
    const TicketPtr ticket = engine->submit(order_of(target, source, 1));
    require(engine->wait(*ticket, kBytes, 20 * kSecond), "a shared copy starved");
  }
}

void a_copier_that_throws_fails_its_ticket() {
  const auto refuse = [](std::byte*, const std::byte*, std::size_t bytes, bool) {
    if (bytes == 4000) throw std::runtime_error("the device is gone");
  };
  const auto engine = Engine::start({2, kChunk, 0, true}, host_backend(refuse));
  const Memory source = pattern(1);
  Memory target(kBytes);
  Order bad;
  bad.segments.push_back({target.data(), source.data(), 3 * kChunk + 4000});
  const TicketPtr failed = engine->submit(std::move(bad));
  require(!engine->wait(*failed, failed->total_bytes, 20 * kSecond), "a failed copy was done");
  require(failed->outcome == Outcome::failed && engine->failure(*failed) == "the device is gone",
          "a failure was lost");
  const TicketPtr good = engine->submit(order_of(target, source, 1));
  require(engine->wait(*good, kBytes, 20 * kSecond), "a failure stopped the engine");
}

// Every start in a line and every length around one, and nothing outside.
void streaming_copies_exactly(const char* instructions) {
  const Memory source = pattern(3);
  for (std::size_t shift = 0; shift < 70; ++shift) {
    for (std::size_t bytes = 0; bytes < 400; bytes += 1 + shift % 3) {
      Memory target(512, std::byte{0xaa});
      if (!copy_streaming_with(instructions, target.data() + shift, &source[1 + shift / 2], bytes))
        return;
      require(std::memcmp(target.data() + shift, &source[1 + shift / 2], bytes) == 0,
              "a streamed copy is wrong");
      const auto is_untouched = [](std::byte byte) { return byte == std::byte{0xaa}; };
      const auto begin = target.begin() + static_cast<std::ptrdiff_t>(shift);
      require(
          std::all_of(target.begin(), begin, is_untouched) &&
              std::all_of(begin + static_cast<std::ptrdiff_t>(bytes), target.end(), is_untouched),
          "a streamed copy went beyond its target");
    }
  }
}

}  // namespace

int main() {
  for (const char* instructions : {"none", "sse2", "avx2", "avx512"}) {
    streaming_copies_exactly(instructions);
  }
  stress(0);
  stress(kFast);
  stress_closing();
  two_threads_share_one_copy();
  a_copier_that_throws_fails_its_ticket();
  std::puts("copy_stress: ok");
  return 0;
}

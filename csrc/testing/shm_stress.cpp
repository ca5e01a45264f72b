// Threads that press ring and table as hard as they can, for the sanitizers: `shm_stress DIR`.
// Sanitizers see one process only, so the threads play the processes and share one mapping.

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "shm/errors.h"
#include "shm/ring.h"
#include "shm/table.h"

namespace {

using namespace aegaeon::shm;

constexpr std::uint32_t kWriters = 3;
constexpr std::uint32_t kRecords = 4000;
constexpr std::int64_t kPatience = 20 * kSecond;
constexpr std::uint32_t kRaces = 20'000;

void require(bool claim, const char* what) {
  if (!claim) {
    std::fprintf(stderr, "shm_stress: %s\n", what);
    std::exit(1);
  }
}

// Words that say who wrote them and when, so that a torn record shows.
std::vector<std::uint32_t> payload(std::uint32_t writer, std::uint32_t sequence) {
  return std::vector<std::uint32_t>(2 + (sequence * 7 + writer) % 400, writer << 24 | sequence);
}

void check_whole(const std::vector<std::uint32_t>& words) {
  require(words.size() >= 2, "a record lost its length");
  for (const std::uint32_t word : words) {
    require(word == words.front(), "a record is torn");
  }
}

void write_records(Ring& ring, std::uint32_t writer) {
  for (std::uint32_t sequence = 0; sequence < kRecords; ++sequence) {
    const auto words = payload(writer, sequence);
    const std::size_t bytes = words.size() * sizeof(std::uint32_t);
    const std::int64_t deadline = now_ns() + kPatience;
    while (true) {
      const Sent sent = ring.send(words.data(), bytes, kPatience);
      if (sent == Sent::committed) break;
      require(sent == Sent::full && now_ns() < deadline, "a writer starved");
      ring.wait_for_space(bytes, kWaitChunk);
    }
  }
}

void read_records(Ring& ring) {
  std::vector<std::uint32_t> expected(kWriters, 0);
  std::uint32_t left = kWriters * kRecords;
  const std::int64_t deadline = now_ns() + kPatience;
  while (left > 0) {
    require(now_ns() < deadline, "the reader starved");
    for (int batch = 0; batch < 16; ++batch) {
      const auto bytes = ring.next_length();
      if (!bytes) break;
      std::vector<std::uint32_t> words(*bytes / sizeof(std::uint32_t));
      ring.take(words.data());
      check_whole(words);
      const std::uint32_t writer = words.front() >> 24;
      require(writer < kWriters && words == payload(writer, expected[writer]++),
              "records of a writer are out of order");
      --left;
    }
    ring.release();
    ring.wait_for_record(kWaitChunk);
    ring.consume_wake();
  }
}

void stress_ring(const std::string& path) {
  Ring ring = Ring::create(path, 1 << 14);
  std::vector<std::thread> threads;
  for (std::uint32_t writer = 0; writer < kWriters; ++writer) {
    threads.emplace_back([&ring, writer] { write_records(ring, writer); });
  }
  threads.emplace_back([&ring] {
    for (int count = 0; count < 1000; ++count) {
      ring.wake();
      require(ring.pending_bytes() <= ring.capacity_bytes(), "pending is out of range");
    }
  });
  read_records(ring);
  for (std::thread& thread : threads) thread.join();
  require(!ring.next_length(), "records appeared from nowhere");
  unlink_region(path);
}

// Few keys, fewer slots: leases end, entries are evicted, slots change their keys under readers.
void write_entries(Table& table, std::uint32_t writer) {
  for (std::uint32_t sequence = 0; sequence < kRecords; ++sequence) {
    const auto words = payload(writer, sequence % 64);
    const std::string value(reinterpret_cast<const char*>(words.data()), words.size() * 4);
    const std::string key = "key" + std::to_string((sequence * 5 + writer) % 24);
    const PutOptions options{sequence % 3 * kMillisecond, 0, PutMode::evict};
    require(table.put(key, value, options, kPatience), "a writer of the table starved");
    bool removed = false;
    if (sequence % 11 == 0) {
      require(table.remove(key, 0, kPatience, removed), "a remover of the table starved");
    }
  }
}

void read_entries(const Table& table, const std::atomic<bool>& done) {
  const auto check = [](const std::string& value) {
    std::vector<std::uint32_t> words(value.size() / 4);
    std::memcpy(words.data(), value.data(), words.size() * 4);
    check_whole(words);
  };
  while (!done.load()) {
    for (int key = 0; key < 24; ++key) {
      if (const auto value = table.get("key" + std::to_string(key))) check(*value);
    }
    for (const auto& entry : table.items()) check(entry.second);
  }
}

void stress_table(const std::string& path) {
  Table table = Table::create(path, 16, 2048);
  std::atomic<bool> done{false};
  std::thread reader([&] { read_entries(table, done); });
  std::vector<std::thread> writers;
  for (std::uint32_t writer = 0; writer < kWriters; ++writer) {
    writers.emplace_back([&table, writer] { write_entries(table, writer); });
  }
  for (std::thread& thread : writers) thread.join();
  done.store(true);
  reader.join();
  unlink_region(path);
}

void spin(std::uint32_t count) {
  for (; count > 0; --count) relax();
}

// Has `bring` end `sleep` again and again, at every offset to its falling asleep. A wake-up that is
// lost costs the whole of kPatience, which no busy machine does.
template <typename Sleep, typename Bring>
void race(std::uint32_t farthest, const Sleep& sleep, const Bring& bring) {
  std::atomic<std::uint32_t> entered{0};
  std::thread bringer([&] {
    for (std::uint32_t round = 1; round <= kRaces; ++round) {
      while (entered.load() != round) relax();
      spin(round * 7919 % farthest);
      bring();
    }
  });
  for (std::uint32_t round = 1; round <= kRaces; ++round) {
    const std::int64_t start = now_ns();
    entered.store(round);
    sleep();
    require(now_ns() - start < kPatience / 2, "a wake-up was lost");
  }
  bringer.join();
}

void stress_wake_ups(const std::string& path) {
  Ring ring = Ring::create(path, 4096);
  std::vector<char> record(4000);
  const auto send = [&] { return ring.send(record.data(), record.size(), kPatience); };
  const auto take = [&] {
    if (!ring.next_length()) return false;
    ring.take(record.data());
    ring.release();
    return true;
  };
  const auto wait_and_take = [&] {
    while (!take()) ring.wait_for_record(kPatience);
  };
  const auto wait_for_wake = [&] {
    while (!ring.consume_wake()) ring.wait_for_record(kPatience);
  };
  std::uint32_t hesitation = 0;
  const auto wait_and_send = [&] {
    while (send() == Sent::full) {
      spin(hesitation++ * 7919 % 400);
      ring.wait_for_space(record.size(), kPatience);
    }
  };
  race(400, wait_and_take, send);
  race(400, wait_for_wake, [&] { ring.wake(); });
  send();
  race(32, wait_and_send, take);
  unlink_region(path);
}

}  // namespace

int main(int count, char** arguments) {
  require(count == 2, "usage: shm_stress DIR");
  const std::string directory = arguments[1];
  try {
    stress_wake_ups(directory + "/wake-ups");
    stress_ring(directory + "/ring");
    stress_table(directory + "/table");
  } catch (const aegaeon::shm::Error& error) {
    require(false, error.what());
  }
  std::puts("shm_stress: ok");
  return 0;
}

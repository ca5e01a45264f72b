// The copy engine's CUDA backend on a stand-in for the CUDA runtime, in all orders in which a
// device might do what it was given: `cuda_copies`.

#include <spawn.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "copy/errors.h"
#include "testing/cuda_bench.h"
#include "testing/cuda_pins.h"

extern char** environ;

namespace {

using namespace cuda_bench;

// Each model comes where the last one still computes, and its host memory goes at once.
void models_take_turns(bool is_pinned) {
  Bench bench;
  Memory host(kBytes);
  if (is_pinned) bench.pin(host);
  for (unsigned model = 0; model < 4; ++model) {
    for (std::size_t at = 0; at < kBytes; ++at) host[at] = pattern(model, at);
    require(bench.wait(bench.submit(bench.memory.base(), host.data(), kBytes)), "weights starved");
    std::fill(host.begin(), host.end(), std::byte{0});
    bench.check(bench.memory.base(), model);
  }
  bench.finish("a model computed with another one's weights");
}

void keys_and_values_go_out_and_come_in(bool is_pinned) {
  Bench bench;
  std::byte* const place = bench.memory.base() + kBytes;
  Memory host(kBytes);
  if (is_pinned) bench.pin(host);
  for (unsigned turn = 0; turn < 3; ++turn) {
    bench.write(place, turn);
    require(bench.wait(bench.submit(host.data(), place, kBytes, 2, true)), "KV out starved");
    require(host == filled(turn), "KV that came out is not what was computed");
    bench.write(place, 100 + turn);
    bench.check(place, 100 + turn);
    require(bench.wait(bench.submit(place, host.data(), kBytes, 0)), "KV in starved");
    std::fill(host.begin(), host.end(), std::byte{0});
    bench.check(place, turn);
  }
  bench.finish("KV that came in is not what went out");
}

// A prefetch, keys and values in and out: all at once, as in a switch.
void streams_do_not_disturb_each_other() {
  Bench bench;
  std::byte* const base = bench.memory.base();
  Memory weights = filled(1), in = filled(2), out(kBytes);
  bench.pin(weights);
  bench.write(base + 2 * kBytes, 3);
  const TicketPtr prefetch = bench.submit(base, weights.data(), kBytes, 2);
  const TicketPtr going = bench.submit(out.data(), base + 2 * kBytes, kBytes, 2, true);
  const TicketPtr coming = bench.submit(base + kBytes, in.data(), kBytes, 0);
  require(bench.wait(coming), "KV in starved");
  bench.check(base + kBytes, 2);
  bench.engine->raise_priority(prefetch, 0);
  require(bench.wait(prefetch) && bench.wait(going), "a copy starved");
  bench.check(base, 1);
  bench.finish("copies of a switch are mixed up");
  require(out == filled(3), "KV that came out is not what was computed");
}

void memory_moves_down_over_itself() {
  for (const std::size_t shift : {std::size_t{64}, kChunk - 1, 3 * kChunk, kBytes + 5}) {
    Bench bench;
    std::byte* const to = bench.memory.base();
    bench.write(to + shift, 7);
    const TicketPtr ticket = bench.engine->submit({{Segment{to, to + shift, kBytes}}});
    require(bench.wait(ticket), "a move starved");
    bench.check(to, 7);
    bench.finish("memory that moved is not what it was");
  }
}

// Whoever has cancelled a copy may use its memory at once, by whatever means. The chunks are large,
// so that some are under way then.
void nothing_touches_the_memory_of_a_cancelled_copy() {
  constexpr std::size_t kLarge = std::size_t{1} << 16;
  constexpr std::size_t kAll = 8 * kLarge;
  constexpr std::byte kMark{0xa5};
  cudart::delay_copies(300);
  Bench bench(kAll + kBytes, kLarge);
  Memory host(kAll), other(kBytes);
  bench.pin(host);
  for (std::size_t round = 0; round < 8; ++round) {
    const bool is_outward = round % 2 == 1;
    std::byte* const to = is_outward ? host.data() : bench.memory.base();
    std::byte* const from = is_outward ? bench.memory.base() : host.data();
    std::memset(from, 0, kAll);
    const TicketPtr ticket = bench.submit(to, from, kAll, 1, is_outward);
    require(bench.engine->wait(*ticket, round / 2 * kLarge, kPatience), "a copy starved");
    bench.engine->cancel(ticket);
    for (std::size_t at = 0; at < kAll; at += 4096) to[at] = kMark;
    require(bench.wait(bench.submit(bench.memory.base() + kAll, other.data(), kBytes)), "starved");
    for (std::size_t at = 0; at < kAll; at += 4096) {
      require(to[at] == kMark, "a cancelled copy went on");
    }
  }
}

// Until none is left to fail: whatever it was, copies are right or say that they failed, nothing is
// touched after that, and all is given back.
bool a_failing_call_is_told(cudart::Order order, std::uint64_t call) {
  cudart::reset(order, call);
  cudart::fail_call(call);
  Memory weights = filled(1), out(kBytes), in = filled(2);
  try {
    Bench bench;
    bench.pin(weights);
    std::byte* const base = bench.memory.base();
    const TicketPtr coming = bench.submit(base, weights.data(), kBytes);
    const TicketPtr staged = bench.submit(base + kBytes, in.data(), kBytes, 0);
    if (bench.wait(coming)) {
      require(std::memcmp(base, weights.data(), kBytes) == 0, "weights are wrong");
    } else {
      require(!bench.engine->failure(*coming).empty(), "a failure was lost");
      std::memset(base, 0, kBytes);
    }
    const TicketPtr going = bench.submit(out.data(), base, kBytes, 2, true);
    const bool is_out = bench.wait(going);
    if (!is_out) std::fill(out.begin(), out.end(), std::byte{0});
    bench.wait(staged);
    bench.close();
    const Memory expected = coming->outcome == Outcome::done ? filled(1) : Memory(kBytes);
    require(std::memcmp(base, expected.data(), kBytes) == 0, "a failed copy went on");
    require(out == (is_out ? expected : Memory(kBytes)), "a failed copy out went on");
  } catch (const cuda::Error&) {
  } catch (const copy::CopyError&) {
  }
  require(cudart::left_over() == 0, "something was not given back");
  return cudart::has_failed();
}

// A device that is lost says so in every call: no copy is done after that, whoever waits is told at
// once, and all is given back.
bool a_lost_device_is_told(cudart::Order order, std::uint64_t call) {
  cudart::reset(order, call);
  cudart::lose_device(call);
  Memory weights = filled(1), out(kBytes), in = filled(2);
  bool is_told = false;
  try {
    Bench bench;
    bench.pin(weights);
    std::byte* const base = bench.memory.base();
    const std::vector<TicketPtr> tickets = {
        bench.submit(base, weights.data(), kBytes),
        bench.submit(base + kBytes, in.data(), kBytes, 0),
        bench.submit(out.data(), base + 2 * kBytes, kBytes, 2, true)};
    bool are_all_done = true;
    for (const TicketPtr& ticket : tickets) {
      if (bench.wait(ticket)) continue;
      require(ticket->outcome == Outcome::lost, "a copy of a lost device is not lost");
      require(!bench.engine->failure(*ticket).empty(), "a loss was lost");
      are_all_done = false;
    }
    try {
      bench.submit(base, weights.data(), kBytes);
      require(are_all_done, "an engine without a device takes copies");
    } catch (const copy::LinkLost&) {
      is_told = true;
    }
    bench.device->check_alive();
    require(!is_told && !cudart::has_failed(), "a lost device was not told");
  } catch (const cuda::Lost&) {
    is_told = true;
  } catch (const copy::LinkLost&) {
    is_told = true;
  }
  require(cudart::left_over() == 0, "something was not given back");
  return is_told;
}

// The first call that may fail once all is made is a copy thread's own first one.
void a_thread_that_cannot_begin_is_told(cudart::Order order) {
  for (std::uint64_t call = 1;; ++call) {
    cudart::reset(order);
    cudart::fail_call(call);
    try {
      Bench bench;
      const Memory host = filled(1);
      const std::int64_t give_up_ns = shm::now_ns() + kPatience;
      while (!cudart::has_failed() && shm::now_ns() < give_up_ns) std::this_thread::yield();
      require(!bench.wait(bench.submit(bench.memory.base(), host.data(), kBytes)) &&
                  !bench.wait(bench.submit(bench.memory.base(), host.data(), kBytes)),
              "an engine copies without its threads");
      require(false, "a thread that could not begin was not told");
    } catch (const copy::LinkLost&) {
      return;
    } catch (const std::exception&) {
      require(call < 50, "nothing can be made");
    }
  }
}

// A copy of one chunk in two pieces: whichever call fails, its memory is the caller's after that.
void a_chunk_that_failed_is_over(cudart::Order order) {
  std::size_t failures = 0;
  for (std::uint64_t call = 1; call < 11; ++call) {
    cudart::reset(order);
    Bench bench;
    std::byte* const to = bench.memory.base();
    const Memory host = filled(1, kChunk);
    bench.wait_for_threads();
    std::memset(to, 0, kChunk);
    cudart::fail_call(call);
    try {
      const TicketPtr ticket = bench.engine->submit(
          {{Segment{to, host.data(), 1000}, Segment{to + 1000, host.data() + 1000, 2000}}});
      if (bench.wait(ticket)) continue;
    } catch (const copy::CopyError&) {
    }
    ++failures;
    std::memset(to, 0, kChunk);
    bench.close();
    require(std::count(to, to + kChunk, std::byte{0}) == kChunk, "a failed chunk went on");
  }
  require(failures == 8, "as many calls as a chunk takes should have failed");
}

void wrong_places_fail_their_copy_only() {
  Bench bench;
  std::byte* const end = bench.memory.base() + bench.memory.bytes();
  Memory host = filled(1), other(kBytes);
  const std::vector<std::pair<std::byte*, const char*>> wrong_places = {
      {end - 1, "goes beyond the device's memory"},
      {bench.memory.base() - 1, "runs into the device's memory"},
      {other.data(), "neither end"}};
  for (const auto& [to, complaint] : wrong_places) {
    const TicketPtr wrong = bench.engine->submit({{Segment{to, host.data(), kChunk}}});
    require(!bench.wait(wrong), "a copy to a wrong place was done");
    require(bench.engine->failure(*wrong).find(complaint) != std::string::npos,
            "a wrong place was not told");
  }
  require(bench.wait(bench.submit(end - kBytes, host.data(), kBytes)), "a good copy failed too");
  bench.check(end - kBytes, 1);
  bench.finish("a good copy is wrong");
}

// A thread that never said which device it means would take memory of the first.
void no_other_device_is_used() {
  Bench bench(4 * kBytes, kChunk, 1);
  Memory host = filled(1), out(kBytes);
  std::thread([&] {
    bench.pin(host);
    require(bench.wait(bench.submit(bench.memory.base(), host.data(), kBytes)), "starved");
    bench.device->zero(bench.memory.base(), kBytes);
    require(bench.wait(bench.submit(out.data(), bench.memory.base(), kBytes, 2, true)), "starved");
    const cuda::Memory more(bench.device, kBytes);
    require(!more.handle().empty() && bench.device->memory().free_bytes > 0, "no memory");
    bench.close();
  }).join();
  require(out == Memory(kBytes), "zeroed memory is not zero");
  require(cudart::used_devices() == 2, "another device was used");
}

// On the modelled clock a chunk follows the other at once.
void the_link_is_never_idle() {
  constexpr std::size_t kLarge = std::size_t{1} << 18;
  constexpr std::size_t kCount = 64;
  Bench bench(kCount * kLarge, kLarge);
  Memory host(kCount * kLarge);
  bench.pin(host);
  const double began_s = cudart::now();
  const TicketPtr ticket =
      bench.engine->submit({{Segment{bench.memory.base(), host.data(), host.size()}}});
  require(bench.wait(ticket), "a copy starved");
  const double took_s = cudart::now() - began_s;
  const double least_s = kCount * (10e-6 + static_cast<double>(kLarge) / 25e9);
  require(took_s < 1.02 * least_s + 20e-6, "the link was idle between chunks");
}

// The other process of a hand-off: it copies what the handle names, and looks at it.
int receive(const char* hex) {
  std::string handle;
  unsigned byte = 0;
  for (; std::sscanf(hex, "%2x", &byte) == 1; hex += 2) handle += static_cast<char>(byte);
  cudart::reset(cudart::Order::lazy);
  Bench bench;
  const cuda::Peer peer(bench.device, handle, kBytes);
  require(bench.wait(bench.submit(bench.memory.base(), peer.base(), kBytes, 0)), "KV starved");
  bench.check(bench.memory.base(), 42);
  bench.finish("KV of another process is not what it computed");
  return 0;
}

void another_process_takes_keys_and_values(const char* program) {
  Bench bench;
  bench.write(bench.memory.base(), 42);
  bench.device->synchronize();
  const std::string handle = bench.memory.handle();
  std::string hex;
  char digits[3];
  for (const char byte : handle) {
    std::snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char>(byte));
    hex += digits;
  }
  std::string role = "receive";
  std::string name = program;
  char* const arguments[] = {name.data(), role.data(), hex.data(), nullptr};
  pid_t child = 0;
  require(posix_spawn(&child, program, nullptr, nullptr, arguments, environ) == 0, "no process");
  int status = 0;
  waitpid(child, &status, 0);
  require(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the receiver failed");
  for (const std::string& wrong : {handle, handle.substr(1)}) {
    bool is_refused = false;
    try {
      const cuda::Peer own(bench.device, wrong, kBytes);
    } catch (const cuda::Error&) {
      is_refused = true;
    }
    require(is_refused, "a handle that is not another process's was opened");
  }
}

template <typename Scenario>
void on_stand_in(cudart::Order order, const Scenario& scenario) {
  cudart::reset(order, static_cast<std::uint64_t>(order) + 17);
  scenario();
  require(cudart::pageable_copies() == 0, "the device was given memory that it cannot reach");
  require(cudart::left_over() == 0, "something was not given back");
}

void run_all(cudart::Order order) {
  for (const bool is_pinned : {false, true}) {
    on_stand_in(order, [=] { models_take_turns(is_pinned); });
    on_stand_in(order, [=] { keys_and_values_go_out_and_come_in(is_pinned); });
  }
  on_stand_in(order, [] {
    cudart::refuse_registration(true);
    models_take_turns(true);
  });
  on_stand_in(order, streams_do_not_disturb_each_other);
  on_stand_in(order, memory_moves_down_over_itself);
  on_stand_in(order, nothing_touches_the_memory_of_a_cancelled_copy);
  on_stand_in(order, wrong_places_fail_their_copy_only);
  on_stand_in(order, the_link_is_never_idle);
  on_stand_in(order, no_other_device_is_used);
  on_stand_in(order, memory_that_is_only_read_is_locked_too);
  on_stand_in(order, much_memory_is_locked_piece_by_piece);
  a_chunk_that_failed_is_over(order);
  a_thread_that_cannot_begin_is_told(order);
  std::uint64_t call = 1;
  while (a_failing_call_is_told(order, call)) ++call;
  require(call > 50, "too few calls could fail");
  call = 1;
  while (a_lost_device_is_told(order, call)) ++call;
  require(call > 50, "too few calls could be the last");
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 2 && std::strcmp(arguments[1], "receive") == 0) return receive(arguments[2]);
  for (const auto order : {cudart::Order::eager, cudart::Order::lazy, cudart::Order::random}) {
    if (count > 1 && static_cast<int>(order) != std::atoi(arguments[1])) continue;
    run_all(order);
  }
  on_stand_in(cudart::Order::lazy, [=] { another_process_takes_keys_and_values(arguments[0]); });
  std::puts("cuda_copies: ok");
  return 0;
}

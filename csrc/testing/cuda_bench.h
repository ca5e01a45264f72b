// What programs that copy by way of the CUDA stand-in are made of: a device with memory, a stream
// that computes, an engine, and kernels that write a pattern or look for it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "copy/engine.h"
#include "cuda/copies.h"
#include "cuda/device.h"
#include "shm/futex.h"
#include "testing/cudart/control.h"

namespace cuda_bench {

using namespace aegaeon;
using copy::Engine;
using copy::Order;
using copy::Outcome;
using copy::Segment;
using copy::TicketPtr;

constexpr std::size_t kChunk = 4096;
constexpr std::size_t kBytes = 50'000;  // a dozen chunks and a rest
constexpr std::int64_t kPatience = 8 * shm::kSecond;
constexpr double kKernelSeconds = 1e-3;

inline void require(bool claim, const char* what) {
  if (!claim) {
    std::fprintf(stderr, "cuda_copies: %s\n", what);
    std::exit(1);
  }
}

inline std::byte pattern(unsigned seed, std::size_t at) {
  return static_cast<std::byte>((at + 1) * 2654435761U * (2 * seed + 1) >> 13);
}

// What a test runs on the device: it writes a pattern, or counts the bytes that are none.
struct Kernel {
  std::byte* place;
  std::size_t bytes;
  unsigned seed;
  bool is_writer;
  std::size_t wrong = 0;
};

inline void run_kernel(void* argument) {
  auto& kernel = *static_cast<Kernel*>(argument);
  for (std::size_t at = 0; at < kernel.bytes; ++at) {
    if (kernel.is_writer) {
      kernel.place[at] = pattern(kernel.seed, at);
    } else {
      kernel.wrong += kernel.place[at] != pattern(kernel.seed, at);
    }
  }
}

using Memory = std::vector<std::byte>;

inline Memory filled(unsigned seed, std::size_t bytes = kBytes) {
  Memory memory(bytes);
  for (std::size_t at = 0; at < bytes; ++at) memory[at] = pattern(seed, at);
  return memory;
}

// A device with memory, one stream that computes, and an engine.
class Bench {
 public:
  explicit Bench(std::size_t device_bytes = 4 * kBytes, std::size_t chunk_bytes = kChunk,
                 int number = 0)
      : device(std::make_shared<cuda::Device>(number)),
        memory(device, device_bytes),
        engine(Engine::start({1, chunk_bytes, 0, true},
                             std::make_unique<cuda::CopyBackend>(device, chunk_bytes))) {}
  ~Bench() {
    close();
    for (void* base : pinned_) device->unpin(base);
  }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;

  // What the device was given is all done then.
  void close() {
    if (engine) engine->close();
    engine.reset();
  }
  void pin(Memory& host) { pin(host.data(), host.size()); }
  // Returns why not.
  std::string pin(void* base, std::size_t bytes, bool is_read_only = false,
                  const cuda::Wanted& is_wanted = {}) {
    std::string refusal = device->pin(base, bytes, is_read_only, is_wanted);
    if (refusal.empty()) pinned_.push_back(base);
    return refusal;
  }
  void unpin(void* base) {
    pinned_.erase(std::remove(pinned_.begin(), pinned_.end(), base), pinned_.end());
    device->unpin(base);
  }
  Kernel& launch(std::byte* place, std::size_t bytes, unsigned seed, bool is_writer) {
    kernels_.push_back(std::make_unique<Kernel>(Kernel{place, bytes, seed, is_writer}));
    cudart::launch(device->compute(), run_kernel, kernels_.back().get(), kKernelSeconds);
    return *kernels_.back();
  }
  void write(std::byte* place, unsigned seed) { launch(place, kBytes, seed, true); }
  void check(std::byte* place, unsigned seed) { launch(place, kBytes, seed, false); }
  // All that was launched has found what it should.
  void finish(const char* what) {
    device->synchronize();
    for (const auto& kernel : kernels_) require(kernel->wrong == 0, what);
    kernels_.clear();
  }
  TicketPtr submit(std::byte* to, const std::byte* from, std::size_t bytes, unsigned priority = 1,
                   bool is_outward = false) {
    Order order;
    order.priority = priority;
    order.is_outward = is_outward;
    // Odd cuts, and an empty one.
    for (std::size_t at = 0; at < bytes; at += 10'007) {
      order.segments.push_back({to + at, from + at, std::min<std::size_t>(10'007, bytes - at)});
      order.segments.push_back({to, from, 0});
    }
    return engine->submit(std::move(order));
  }
  // Until both copy threads have begun: their first calls are counted too, and may be those that a
  // test has fail. Writes the first bytes of `memory`.
  void wait_for_threads() {
    Memory host(kChunk);
    for (const bool is_outward : {false, true}) {
      std::byte* const to = is_outward ? host.data() : memory.base();
      std::byte* const from = is_outward ? memory.base() : host.data();
      require(wait(submit(to, from, kChunk, 1, is_outward)), "a copy thread does not begin");
    }
  }
  bool wait(const TicketPtr& ticket) {
    return engine->wait(*ticket, ticket->total_bytes, kPatience);
  }

  const std::shared_ptr<cuda::Device> device;
  const cuda::Memory memory;
  std::shared_ptr<Engine> engine;

 private:
  std::vector<void*> pinned_;
  std::vector<std::unique_ptr<Kernel>> kernels_;
};

}  // namespace cuda_bench

// The state of the stand-in, over which there is one lock, and what every call does with it.
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <set>

#include "testing/cudart/memory.h"
#include "testing/cudart/races.h"
#include "testing/cudart/streams.h"

namespace cudart {

constexpr int kDevices = 2;
// On the modelled clock, within the device.
constexpr double kInsideBytesPerSecond = 1e12;

// What a test says of the device and its driver.
struct Model {
  int driver = CUDART_VERSION;
  int major = 9;
  int minor = 0;
  int block_shared_bytes = 227 << 10;
  bool locks_read_only = true;
  bool has_host_tables = false;
  bool is_registration_refused = false;
  double link_bytes_per_s = 25e9;
  double copy_s = 10e-6;  // before the first byte
};

struct Runtime {
  std::recursive_mutex mutex;
  Streams streams;
  Memory memory;
  std::set<cudaEvent_t> events;
  std::uint64_t call = 0;
  std::uint64_t failing_call = 0;
  std::uint64_t losing_call = 0;
  std::uint64_t pageable_copies = 0;
  unsigned used_devices = 0;
  std::chrono::microseconds delay{0};
  Model model;

  Runtime();
};

Runtime& runtime();

// The calling thread's.
cudaError_t& last_error();
int& current_device();

class Locked {
 public:
  // `is_use`: on a real device it takes memory there.
  explicit Locked(bool is_use = true) {
    races::enter();
    runtime().mutex.lock();
    if (is_use) runtime().used_devices |= 1U << current_device();
  }
  ~Locked() {
    runtime().mutex.unlock();
    races::leave();
  }
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;
  Runtime* operator->() const { return &runtime(); }
};

// Returns `error`, as the next cudaGetLastError does.
cudaError_t told(cudaError_t error);
cudaError_t told(bool is_good, cudaError_t otherwise);

// Counts a call that may fail, under the lock; returns what it must fail with: `ordinary` if it is
// the call that a test chose, the device's last word if that is lost, else success.
cudaError_t failure(cudaError_t ordinary = cudaErrorOperatingSystem);
// What a call that gives back tells: it does so even of a device that is lost, and is not counted.
cudaError_t last_word();

inline bool is_on_device(Kind kind) { return kind == Kind::device || kind == Kind::peer; }

}  // namespace cudart

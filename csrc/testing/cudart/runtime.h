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

struct Runtime {
  std::recursive_mutex mutex;
  Streams streams;
  Memory memory;
  std::set<cudaEvent_t> events;
  std::uint64_t call = 0;
  std::uint64_t failing_call = 0;
  std::uint64_t pageable_copies = 0;
  unsigned used_devices = 0;
  bool is_registration_refused = false;
  std::chrono::microseconds delay{0};

  Runtime();
};

Runtime& runtime();

// The calling thread's.
cudaError_t& last_error();
int& current_device();

class Locked {
 public:
  Locked() {
    races::enter();
    runtime().mutex.lock();
    runtime().used_devices |= 1U << current_device();
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
// the call that a test chose, else success.
cudaError_t failure(cudaError_t ordinary = cudaErrorUnknown);

}  // namespace cudart

// What a test may ask of the stand-in for the CUDA runtime: when queued operations run, which call
// fails, what time it is on the modelled clock.
#pragma once

#include <driver_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>

namespace cudart {

enum class Order : std::uint8_t {
  eager,   // an operation runs as soon as it is queued
  lazy,    // when a call waits for it, and not before
  random,  // some now, some later
};

// Forgets everything; nothing may be left (see `left_over`).
void reset(Order order, std::uint64_t seed = 1);
// Runs `kernel(argument)` on the stream, for `seconds` of the modelled clock.
void launch(cudaStream_t stream, void (*kernel)(void*), void* argument, double seconds);
// Runs `work` on the stream.
void enqueue(CUstream_st* stream, std::function<void()> work);
// Has the `call`th call from now on that may fail do so, and none after it; 0: none.
void fail_call(std::uint64_t call);
// Whether that call has come.
bool has_failed();
// Has the driver refuse to page-lock memory of others.
void refuse_registration(bool is_refused);
// Has the driver record no graphs.
void refuse_graphs(bool is_refused);
// Has each copy begin so much later than it could, for real.
void delay_copies(std::int64_t microseconds);
// Seconds on the modelled clock.
double now();
// Copies that were given memory which the device cannot reach.
std::uint64_t pageable_copies();
// Devices that something was called for, a bit each: on a real one that takes memory.
unsigned used_devices();
// Streams, events and memory that have not been given back.
std::size_t left_over();

}  // namespace cudart

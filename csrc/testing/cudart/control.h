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
// Whether that call, or the one that lost the device, has come.
bool has_failed();
// Has the `call`th call from now on, and every one after it, fail with what a device says last;
// what streams were given is never done then. 0: never.
void lose_device(std::uint64_t call);
// Has the driver refuse to page-lock memory of others.
void refuse_registration(bool is_refused);
// Whether it knows how to lock memory that is mapped read-only, as it does, or needs not: the
// device reads through the host's page tables.
void lock_read_only(bool is_known, bool is_needless = false);
// What the device is; 9.0 with 227 KiB.
void set_capability(int major, int minor, int block_shared_bytes);
// Which CUDA the driver is for, as the runtime counts; the toolkit's.
void set_driver(int version);
// Has the driver record no graphs.
void refuse_graphs(bool is_refused);
// Has each copy begin so much later than it could, for real.
void delay_copies(std::int64_t microseconds);
// How fast copies are on the modelled clock, each of which takes `copy_s` before its first byte.
void set_link(double bytes_per_s, double copy_s);
// Seconds on the modelled clock.
double now();
// Copies that were given memory which the device cannot reach.
std::uint64_t pageable_copies();
// Devices that something was called for, a bit each: on a real one that takes memory.
unsigned used_devices();
// Streams, events and memory that have not been given back.
std::size_t left_over();

}  // namespace cudart

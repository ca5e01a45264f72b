// What we use of the CUDA runtime, owned and checked. Included only where CUDA is compiled.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <utility>

#include "cuda/errors.h"

namespace aegaeon::cuda {

// Raises Error, which names `what` was tried; Lost where no call will do any more.
void check(cudaError_t result, const char* what);
// A failure in words.
std::string told(cudaError_t result);

// How many devices there are. Raises Error, which says why there is none.
int count_devices();

// The memory of a device, without making anything on it. Raises Error.
std::size_t total_bytes(int device);

// What the device can do. Raises Error.
int attribute(int device, cudaDeviceAttr which);

// Makes `device` the calling thread's, before it calls anything else: a thread begins with cuda:0,
// and whatever it calls takes some hundred MB of its device. For the same reason no other device is
// put back after: a process has one. Raises Error.
void use_device(int device);
// The same in a destructor, which any thread may come to: what is destroyed after it is `device`'s.
void end_with_device(int device);

// One of the device's queues, beside the default one; of the thread's device. Destroying it waits
// for what it has been given.
class Stream {
 public:
  // `is_urgent`: its kernels go before others'.
  explicit Stream(bool is_urgent = false);
  ~Stream();
  Stream(Stream&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Stream& operator=(Stream&&) = delete;

  cudaStream_t handle() const { return handle_; }
  void synchronize() const { check(cudaStreamSynchronize(handle_), "wait for a stream"); }

 private:
  cudaStream_t handle_ = nullptr;
};

// A point in a stream, of the thread's device.
class Event {
 public:
  Event();
  ~Event();
  Event(Event&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Event& operator=(Event&&) = delete;

  // The point behind all that `stream` has been given so far.
  void record(cudaStream_t stream) { check(cudaEventRecord(handle_, stream), "record an event"); }
  // What `stream` is given from now on waits for that point.
  void hold_back(cudaStream_t stream) const {
    check(cudaStreamWaitEvent(stream, handle_, 0), "have a stream wait");
  }
  // Sleeps until that point.
  void wait() const { check(cudaEventSynchronize(handle_), "wait for an event"); }

 private:
  cudaEvent_t handle_ = nullptr;
};

// Page-locked memory of the host.
class PinnedMemory {
 public:
  explicit PinnedMemory(std::size_t bytes);
  ~PinnedMemory();
  PinnedMemory(PinnedMemory&& other) noexcept : base_(std::exchange(other.base_, nullptr)) {}
  PinnedMemory& operator=(PinnedMemory&&) = delete;

  std::byte* base() const { return static_cast<std::byte*>(base_); }

 private:
  void* base_ = nullptr;
};

// Memory of a device, by plain cudaMalloc: what of it is whose is not the driver's business, and
// other processes on the device may open it.
class DeviceMemory {
 public:
  DeviceMemory(int device, std::size_t bytes);
  ~DeviceMemory();
  DeviceMemory(DeviceMemory&& other) noexcept
      : device_(other.device_), bytes_(other.bytes_), base_(std::exchange(other.base_, nullptr)) {}
  DeviceMemory& operator=(DeviceMemory&&) = delete;

  int device() const { return device_; }
  std::size_t bytes() const { return bytes_; }
  std::byte* base() const { return static_cast<std::byte*>(base_); }
  // By which another process, and not this one, opens it.
  cudaIpcMemHandle_t handle() const;

 private:
  int device_;
  std::size_t bytes_;
  void* base_ = nullptr;
};

// Another process's memory of the same device, which stays for as long as that one keeps it.
class PeerMemory {
 public:
  PeerMemory(int device, const cudaIpcMemHandle_t& handle);
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  std::byte* base() const { return static_cast<std::byte*>(base_); }

 private:
  int device_;
  void* base_ = nullptr;
};

}  // namespace aegaeon::cuda

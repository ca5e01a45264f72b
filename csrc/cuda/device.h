// One CUDA device as a process uses it: the stream that computes, its memory, and which addresses
// copies may touch.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <utility>

#include "cuda/places.h"
#include "cuda/runtime.h"
#include "memory/kv_arena.h"

namespace aegaeon::cuda {

struct MemoryInfo {
  std::size_t free_bytes;
  std::size_t total_bytes;
};

class Device {
 public:
  // Raises Error: there is no such device, or no driver.
  explicit Device(int number);
  ~Device() { end_with_device(number_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  int number() const { return number_; }
  MemoryInfo memory() const;
  // What computes. Copies that are submitted to an engine of this device start behind all that it
  // has been given by then; so it must not be captured into a graph.
  cudaStream_t compute() const { return compute_.handle(); }
  // Sleeps until the stream that computes has done all that it has been given by now.
  void synchronize() const;
  // Behind what the stream that computes was given, before what it will be.
  void zero(std::byte* place, std::size_t bytes) const;

  Places& places() { return places_; }
  const Places& places() const { return places_; }
  // Raises Lost where the device is. Waits for nothing.
  void check_alive() const;
  // Major and minor.
  std::pair<int, int> capability() const;
  // Shared memory that a block of threads may ask for.
  std::size_t block_shared_bytes() const;
  // As of Places, from any thread, and with what can be done about a refusal. `is_read_only`: this
  // process has it mapped so.
  std::string pin(void* base, std::size_t bytes, bool is_read_only, const Wanted& is_wanted);
  void unpin(void* base);

 private:
  static int checked(int number);

  const int number_;
  Places places_;
  Stream compute_;
  // Where a thread waits; one that waits for the point of another waits for a later one.
  mutable Event done_;
};

// Memory of `device`, zeroed, for copies too.
class Memory final : public memory::DeviceBytes {
 public:
  Memory(std::shared_ptr<Device> device, std::size_t bytes);
  ~Memory() override;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  std::byte* base() const { return memory_.base(); }
  std::size_t bytes() const { return memory_.bytes(); }
  int device() const { return memory_.device(); }
  // By which another process opens it.
  std::string handle() const;
  void zero(std::byte* place, std::size_t bytes) override { device_->zero(place, bytes); }

 private:
  const std::shared_ptr<Device> device_;
  const DeviceMemory memory_;
};

// Another process's memory of the same device, from where copies may be made; it stays as long as
// that process keeps it.
class Peer {
 public:
  // `handle`: of a Memory of `bytes`. Raises Error where it is not one, or our own.
  Peer(std::shared_ptr<Device> device, const std::string& handle, std::size_t bytes);
  ~Peer();
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;

  std::byte* base() const { return memory_.base(); }

 private:
  const std::shared_ptr<Device> device_;
  const PeerMemory memory_;
};

}  // namespace aegaeon::cuda

#include "cuda/device.h"

#include <cstring>
#include <utility>

namespace aegaeon::cuda {
namespace {

cudaIpcMemHandle_t handle_of(const std::string& text) {
  cudaIpcMemHandle_t handle{};
  if (text.size() != sizeof handle) {
    throw Error("a handle of device memory has " + std::to_string(sizeof handle) + " bytes, not " +
                std::to_string(text.size()));
  }
  std::memcpy(&handle, text.data(), sizeof handle);
  return handle;
}

}  // namespace

Device::Device(int number) : number_(checked(number)), compute_(true) {}

int Device::checked(int number) {
  total_bytes(number);  // says what is wrong with the number
  use_device(number);
  return number;
}

MemoryInfo Device::memory() const {
  use_device(number_);
  MemoryInfo info{};
  check(cudaMemGetInfo(&info.free_bytes, &info.total_bytes), "ask for the device's memory");
  return info;
}

void Device::synchronize() const {
  use_device(number_);
  done_.record(compute());
  done_.wait();
}

void Device::check_alive() const {
  use_device(number_);
  const cudaError_t result = cudaStreamQuery(compute());
  if (result != cudaErrorNotReady) check(result, "look after the device");
}

std::pair<int, int> Device::capability() const {
  return {attribute(number_, cudaDevAttrComputeCapabilityMajor),
          attribute(number_, cudaDevAttrComputeCapabilityMinor)};
}

std::size_t Device::block_shared_bytes() const {
  return static_cast<std::size_t>(attribute(number_, cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// The flag is an error where the device does not know it. Where the device reads through the
// host's own page tables, read-only memory is locked without; elsewhere the driver then refuses.
std::string Device::pin(void* base, std::size_t bytes, bool is_read_only, const Wanted& is_wanted) {
  use_device(number_);
  unsigned flags = cudaHostRegisterPortable;
  const bool has_flag = attribute(number_, cudaDevAttrHostRegisterReadOnlySupported) != 0;
  if (is_read_only && has_flag) flags |= cudaHostRegisterReadOnly;
  const std::string refusal = places_.pin(base, bytes, flags, is_wanted);
  if (refusal.empty()) return refusal;
  if (is_read_only && !has_flag) {
    return refusal +
           "; this driver and device lock no memory that is mapped read-only, a newer "
           "driver may";
  }
  return refusal +
         "; raise the limit of locked memory (ulimit -l unlimited, docker run --ulimit "
         "memlock=-1) and of the container's memory";
}

// Whoever lets go of memory cannot do anything about a failure.
void Device::unpin(void* base) {
  end_with_device(number_);
  places_.unpin(base);
}

void Device::zero(std::byte* place, std::size_t bytes) const {
  use_device(number_);
  check(cudaMemsetAsync(place, 0, bytes, compute()), "zero memory of the device");
}

Memory::Memory(std::shared_ptr<Device> device, std::size_t bytes)
    : device_(std::move(device)), memory_(device_->number(), bytes) {
  device_->zero(base(), bytes);
  device_->synchronize();  // who opens it in another process is ordered with none of our streams
  device_->places().add_device(base(), bytes);
}

Memory::~Memory() { device_->places().remove_device(base()); }

std::string Memory::handle() const {
  use_device(device_->number());
  const cudaIpcMemHandle_t handle = memory_.handle();
  return {reinterpret_cast<const char*>(&handle), sizeof handle};
}

Peer::Peer(std::shared_ptr<Device> device, const std::string& handle, std::size_t bytes)
    : device_(std::move(device)), memory_(device_->number(), handle_of(handle)) {
  device_->places().add_device(base(), bytes);
}

Peer::~Peer() { device_->places().remove_device(base()); }

}  // namespace aegaeon::cuda

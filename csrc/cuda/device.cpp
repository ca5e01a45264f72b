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
  compute_.synchronize();
}

bool Device::pin(void* base, std::size_t bytes) {
  use_device(number_);
  return places_.pin(base, bytes);
}

void Device::unpin(void* base) {
  use_device(number_);
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

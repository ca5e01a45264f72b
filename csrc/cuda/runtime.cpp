#include "cuda/runtime.h"

namespace aegaeon::cuda {
namespace {

// In a process that ends, the driver may have gone before us: nothing can be done about a failure.
void forgive(cudaError_t result) {
  if (result != cudaSuccess) cudaGetLastError();
}

}  // namespace

void check(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  cudaGetLastError();  // so that nobody takes it for the failure of a later call
  throw Error(std::string("cannot ") + what + ": " + cudaGetErrorString(result) + " (" +
              cudaGetErrorName(result) + ")");
}

int count_devices() {
  int count = 0;
  const cudaError_t result = cudaGetDeviceCount(&count);
  if (result == cudaErrorNoDevice || result == cudaErrorInsufficientDriver) {
    cudaGetLastError();
    throw Error(std::string("there is no CUDA device to use here (") + cudaGetErrorString(result) +
                "); install NVIDIA's driver for it, or serve with --device cpu");
  }
  check(result, "look for CUDA devices");
  return count;
}

std::size_t total_bytes(int device) {
  const int count = count_devices();
  if (device < 0 || device >= count) {
    throw Error("there is no cuda:" + std::to_string(device) + "; this machine has " +
                std::to_string(count) + ", counted from cuda:0");
  }
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "ask for the device's memory");
  return properties.totalGlobalMem;
}

void use_device(int device) { check(cudaSetDevice(device), "use the CUDA device"); }

void end_with_device(int device) { forgive(cudaSetDevice(device)); }

Stream::Stream(bool is_urgent) {
  int least = 0;
  int greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "make a stream");
  check(cudaStreamCreateWithPriority(&handle_, cudaStreamNonBlocking, is_urgent ? greatest : least),
        "make a stream");
}

Stream::~Stream() {
  if (handle_ == nullptr) return;
  forgive(cudaStreamSynchronize(handle_));
  forgive(cudaStreamDestroy(handle_));
}

// Whoever waits sleeps, for its processor is wanted by others.
Event::Event() {
  check(cudaEventCreateWithFlags(&handle_, cudaEventDisableTiming | cudaEventBlockingSync),
        "make an event");
}

Event::~Event() {
  if (handle_ != nullptr) forgive(cudaEventDestroy(handle_));
}

PinnedMemory::PinnedMemory(std::size_t bytes) {
  check(cudaHostAlloc(&base_, bytes, cudaHostAllocDefault), "get page-locked memory");
}

PinnedMemory::~PinnedMemory() {
  if (base_ != nullptr) forgive(cudaFreeHost(base_));
}

DeviceMemory::DeviceMemory(int device, std::size_t bytes) : device_(device), bytes_(bytes) {
  use_device(device);
  const std::string what = "get " + std::to_string(bytes) + " bytes of device memory";
  check(cudaMalloc(&base_, bytes), what.c_str());
}

DeviceMemory::~DeviceMemory() {
  if (base_ == nullptr) return;
  end_with_device(device_);
  forgive(cudaFree(base_));
}

cudaIpcMemHandle_t DeviceMemory::handle() const {
  cudaIpcMemHandle_t handle{};
  check(cudaIpcGetMemHandle(&handle, base_), "share the device's memory");
  return handle;
}

PeerMemory::PeerMemory(int device, const cudaIpcMemHandle_t& handle) {
  use_device(device);
  check(cudaIpcOpenMemHandle(&base_, handle, cudaIpcMemLazyEnablePeerAccess),
        "open another process's device memory");
}

PeerMemory::~PeerMemory() {
  if (base_ != nullptr) forgive(cudaIpcCloseMemHandle(base_));
}

}  // namespace aegaeon::cuda

#include "cuda/runtime.h"

#include "cuda/sticky.h"

namespace aegaeon::cuda {
namespace {

// In a process that ends, the driver may have gone before us: nothing can be done about a failure.
void forgive(cudaError_t result) {
  if (result != cudaSuccess) cudaGetLastError();
}

std::string version_of(int code) {
  return std::to_string(code / 1000) + "." + std::to_string(code % 1000 / 10);
}

// A runtime asks for a driver of its own major version; 0: there is no driver at all.
std::string without_driver() {
  int driver = 0;
  int runtime = 0;
  forgive(cudaDriverGetVersion(&driver));
  forgive(cudaRuntimeGetVersion(&runtime));
  const std::string needed = "this build needs one for CUDA " + version_of(runtime / 1000 * 1000);
  if (driver == 0) return "there is no NVIDIA driver here, and " + needed + " or newer";
  return "the NVIDIA driver here is for CUDA " + version_of(driver) + ", and " + needed +
         " or newer";
}

}  // namespace

void check(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  cudaGetLastError();  // so that nobody takes it for the failure of a later call
  const std::string said = std::string("cannot ") + what + ": " + told(result);
  if (is_sticky(result)) {
    throw Lost(said + "; the device is lost to this process, another one has to be started");
  }
  throw Error(said);
}

std::string told(cudaError_t result) {
  return std::string(cudaGetErrorString(result)) + " (" + cudaGetErrorName(result) + ")";
}

int count_devices() {
  int count = 0;
  const cudaError_t result = cudaGetDeviceCount(&count);
  if (result == cudaErrorInsufficientDriver) {
    cudaGetLastError();
    throw Error(without_driver() +
                "; install it (nvidia-smi tells which is there), or serve with " + "--device cpu");
  }
  if (result == cudaErrorNoDevice) {
    cudaGetLastError();
    throw Error(std::string("there is no CUDA device to use here (") + cudaGetErrorString(result) +
                "); look whether nvidia-smi lists one, or serve with --device cpu");
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

int attribute(int device, cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "ask what the device can do");
  return value;
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

PeerMemory::PeerMemory(int device, const cudaIpcMemHandle_t& handle) : device_(device) {
  use_device(device);
  check(cudaIpcOpenMemHandle(&base_, handle, cudaIpcMemLazyEnablePeerAccess),
        "open another process's device memory");
}

PeerMemory::~PeerMemory() {
  if (base_ == nullptr) return;
  end_with_device(device_);
  forgive(cudaIpcCloseMemHandle(base_));
}

}  // namespace aegaeon::cuda

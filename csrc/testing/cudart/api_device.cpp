// The calls of the CUDA runtime about errors, the driver and devices; see api.cpp.

#include <cuda_runtime_api.h>

#include "testing/cudart/runtime.h"

using cudart::Locked;
using cudart::told;

extern "C" {

cudaError_t CUDARTAPI cudaGetLastError() {
  const cudaError_t error = cudart::last_error();
  cudart::last_error() = cudaSuccess;
  return error;
}

const char* CUDARTAPI cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorOperatingSystem  ? "cudaErrorOperatingSystem"
         : error == cudaErrorIllegalAddress ? "cudaErrorIllegalAddress"
                                            : "another error of CUDA";
}

const char* CUDARTAPI cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory"
         : error == cudaErrorIllegalAddress ? "an illegal memory access was encountered"
                                            : "it was refused";
}

cudaError_t CUDARTAPI cudaDriverGetVersion(int* version) {
  const Locked all(false);
  *version = all->model.driver;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

// Uses no device.
cudaError_t CUDARTAPI cudaGetDeviceCount(int* count) {
  const Locked all(false);
  *count = 0;
  if (const cudaError_t failed = cudart::failure(); failed != cudaSuccess) return failed;
  *count = cudart::kDevices;
  const int driver = all->model.driver;
  return told(driver / 1000 >= CUDART_VERSION / 1000, cudaErrorInsufficientDriver);
}

cudaError_t CUDARTAPI cudaSetDevice(int device) {
  if (device < 0 || device >= cudart::kDevices) return told(cudaErrorInvalidDevice);
  cudart::current_device() = device;
  const Locked all;
  return cudart::failure();
}

cudaError_t CUDARTAPI cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  const Locked all(false);
  if (const cudaError_t failed = cudart::failure(); failed != cudaSuccess) return failed;
  *properties = {};
  properties->totalGlobalMem = all->memory.total_bytes();
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const Locked all(false);
  if (const cudaError_t failed = cudart::failure(); failed != cudaSuccess) return failed;
  const cudart::Model& model = all->model;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = model.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = model.minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = model.block_shared_bytes;
      return cudaSuccess;
    case cudaDevAttrHostRegisterReadOnlySupported:
      *value = model.locks_read_only ? 1 : 0;
      return cudaSuccess;
    default:
      return told(cudaErrorInvalidValue);
  }
}

cudaError_t CUDARTAPI cudaMemGetInfo(std::size_t* free_bytes, std::size_t* total_bytes) {
  const Locked all;
  if (const cudaError_t failed = cudart::failure(); failed != cudaSuccess) return failed;
  *free_bytes = all->memory.free_bytes();
  *total_bytes = all->memory.total_bytes();
  return cudaSuccess;
}

}  // extern "C"

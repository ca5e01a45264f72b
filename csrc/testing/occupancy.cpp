// How many blocks of a kernel a multiprocessor holds at once, by the toolkit's own calculator: a
// library that tests call from Python.

#include <cstddef>

#include "cuda_occupancy.h"

namespace {

// Of compute capability 8.0 or 9.0, as the programming guide has them.
cudaOccDeviceProp device(int capability) {
  cudaOccDeviceProp device;
  device.computeMajor = capability / 10;
  device.computeMinor = capability % 10;
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = 2048;
  device.regsPerBlock = 64 << 10;
  device.regsPerMultiprocessor = 64 << 10;
  device.warpSize = 32;
  device.sharedMemPerBlock = 48 << 10;
  device.sharedMemPerMultiprocessor = (capability == 80 ? 164 : 228) << 10;
  device.numSms = capability == 80 ? 108 : 132;
  device.sharedMemPerBlockOptin = device.sharedMemPerMultiprocessor - (1 << 10);
  device.reservedSharedMemPerBlock = 1 << 10;
  return device;
}

}  // namespace

// 0: none fits.
extern "C" int blocks_at_once(int capability, int threads, int registers,
                              std::size_t shared_bytes) {
  const cudaOccDeviceProp properties = device(capability);
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = threads;
  kernel.numRegs = registers;
  kernel.sharedSizeBytes = 0;
  kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = shared_bytes;
  kernel.numBlockBarriers = 1;
  kernel.virtualResourceCount = 0;
  const cudaOccDeviceState state;
  cudaOccResult result;
  const cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &properties, &kernel,
                                                                     &state, threads, shared_bytes);
  return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : 0;
}

// The calls of the CUDA runtime that make, lock and share memory; see api.cpp.

#include <cuda_runtime_api.h>

#include "testing/cudart/graphs.h"
#include "testing/cudart/mappings.h"
#include "testing/cudart/runtime.h"

using cudart::failure;
using cudart::Kind;
using cudart::Locked;
using cudart::spoils_recording;
using cudart::told;

namespace {

cudaError_t make(void** base, std::size_t bytes, Kind kind) {
  *base = nullptr;
  const Locked all;
  if (spoils_recording()) return told(cudaErrorStreamCaptureUnsupported);
  const cudaError_t failed = failure(cudaErrorMemoryAllocation);
  if (failed != cudaSuccess) return failed;
  *base = all->memory.make(bytes, kind);
  return told(*base != nullptr, cudaErrorMemoryAllocation);
}

// The driver frees nothing that is in use.
cudaError_t give_back(void* base, Kind kind) {
  const Locked all;
  if (spoils_recording()) return told(cudaErrorStreamCaptureUnsupported);
  const cudaError_t word = cudart::last_word();
  all->streams.wait_for_all();
  const bool is_there = all->memory.free(base, kind);
  return word != cudaSuccess ? word : told(is_there, cudaErrorInvalidValue);
}

}  // namespace

extern "C" {

cudaError_t CUDARTAPI cudaMalloc(void** base, std::size_t bytes) {
  return make(base, bytes, Kind::device);
}

cudaError_t CUDARTAPI cudaFree(void* base) { return give_back(base, Kind::device); }

cudaError_t CUDARTAPI cudaHostAlloc(void** base, std::size_t bytes, unsigned) {
  return make(base, bytes, Kind::pinned);
}

cudaError_t CUDARTAPI cudaFreeHost(void* base) { return give_back(base, Kind::pinned); }

// As a driver that reads host memory by itself, not through the host's page tables: what is not
// mapped, or only to be read and not said to be, cannot be locked.
cudaError_t CUDARTAPI cudaHostRegister(void* base, std::size_t bytes, unsigned flags) {
  const Locked all;
  const cudaError_t failed = failure(cudaErrorMemoryAllocation);
  if (failed != cudaSuccess) return failed;
  if (all->model.is_registration_refused) return told(cudaErrorMemoryAllocation);
  const bool is_read_only = (flags & cudaHostRegisterReadOnly) != 0;
  if (is_read_only && !all->model.locks_read_only) return told(cudaErrorNotSupported);
  const bool is_written = !is_read_only && !all->model.has_host_tables;
  if (!cudart::are_mapped(base, bytes, is_written)) return told(cudaErrorInvalidValue);
  return told(all->memory.enter(base, bytes, Kind::registered),
              cudaErrorHostMemoryAlreadyRegistered);
}

// Unlike freeing, this waits for nobody.
cudaError_t CUDARTAPI cudaHostUnregister(void* base) {
  const Locked all;
  const cudaError_t word = cudart::last_word();
  const bool is_there = all->memory.forget(base, Kind::registered);
  return word != cudaSuccess ? word : told(is_there, cudaErrorHostMemoryNotRegistered);
}

cudaError_t CUDARTAPI cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* base) {
  const Locked all;
  const cudaError_t failed = failure(cudaErrorInvalidValue);
  if (failed != cudaSuccess) return failed;
  return told(all->memory.share(base, *handle), cudaErrorInvalidValue);
}

cudaError_t CUDARTAPI cudaIpcOpenMemHandle(void** base, cudaIpcMemHandle_t handle, unsigned) {
  *base = nullptr;
  const Locked all;
  const cudaError_t failed = failure(cudaErrorMapBufferObjectFailed);
  if (failed != cudaSuccess) return failed;
  *base = all->memory.open(handle);
  return told(*base != nullptr, cudaErrorMapBufferObjectFailed);
}

cudaError_t CUDARTAPI cudaIpcCloseMemHandle(void* base) { return give_back(base, Kind::peer); }

}  // extern "C"

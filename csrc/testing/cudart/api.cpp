// The calls of the CUDA runtime that we use, on the stand-in's streams and memory: compiled against
// the toolkit's own header, linked in place of its library.

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "testing/cudart/control.h"
#include "testing/cudart/graphs.h"
#include "testing/cudart/runtime.h"

namespace {

using cudart::Kind;
using cudart::Locked;
using cudart::Operation;
using cudart::runtime;
using cudart::spoils_recording;
using cudart::told;
using cudart::Unit;

constexpr std::size_t kDeviceBytes = std::size_t{1} << 30;
constexpr int kDevices = 2;
constexpr double kLinkBytesPerSecond = 25e9;
constexpr double kInsideBytesPerSecond = 1e12;
constexpr double kCopySeconds = 10e-6;  // before the first byte

bool must_fail() { return cudart::failure() != cudaSuccess; }

bool is_on_device(Kind kind) { return kind == Kind::device || kind == Kind::peer; }

bool fits(cudaMemcpyKind direction, Kind to, Kind from) {
  switch (direction) {
    case cudaMemcpyHostToDevice:
      return is_on_device(to) && !is_on_device(from);
    case cudaMemcpyDeviceToHost:
      return !is_on_device(to) && is_on_device(from);
    case cudaMemcpyDeviceToDevice:
      return is_on_device(to) && is_on_device(from);
    default:
      return false;
  }
}

Operation copy_operation(void* to, const void* from, std::size_t bytes, cudaMemcpyKind direction) {
  Operation copy;
  copy.work = [to, from, bytes, delay = runtime().delay] {
    std::this_thread::sleep_for(delay);
    std::memcpy(to, from, bytes);
  };
  copy.unit = direction == cudaMemcpyHostToDevice   ? Unit::inward
              : direction == cudaMemcpyDeviceToHost ? Unit::outward
                                                    : Unit::inside;
  const double rate = copy.unit == Unit::inside ? kInsideBytesPerSecond : kLinkBytesPerSecond;
  copy.seconds = kCopySeconds + static_cast<double>(bytes) / rate;
  return copy;
}

bool are_apart(const void* to, const void* from, std::size_t bytes) {
  const auto* left = static_cast<const std::byte*>(to);
  const auto* right = static_cast<const std::byte*>(from);
  return left + bytes <= right || right + bytes <= left;
}

}  // namespace

namespace cudart {

Runtime::Runtime() { memory.reset(kDeviceBytes); }

Runtime& runtime() {
  static Runtime* const one = new Runtime;
  return *one;
}

cudaError_t& last_error() {
  thread_local cudaError_t error = cudaSuccess;
  return error;
}

int& current_device() {
  thread_local int device = 0;
  return device;
}

cudaError_t told(cudaError_t error) {
  if (error != cudaSuccess) last_error() = error;
  return error;
}

cudaError_t told(bool is_good, cudaError_t otherwise) {
  return told(is_good ? cudaSuccess : otherwise);
}

cudaError_t failure(cudaError_t ordinary) {
  Runtime& all = runtime();
  return told(++all.call != all.failing_call, ordinary);
}

void reset(Order order, std::uint64_t seed) {
  const Locked all;
  all->streams.reset(order, seed);
  all->call = all->failing_call = all->pageable_copies = 0;
  all->used_devices = 0;
  all->is_registration_refused = false;
  all->delay = std::chrono::microseconds(0);
}

void launch(cudaStream_t stream, void (*kernel)(void*), void* argument, double seconds) {
  const Locked all;
  Operation operation;
  operation.work = [=] { kernel(argument); };
  operation.seconds = seconds;
  all->streams.push(stream, std::move(operation));
}

void enqueue(CUstream_st* stream, std::function<void()> work) {
  const Locked all;
  Operation operation;
  operation.work = std::move(work);
  all->streams.push(stream, std::move(operation));
}

void fail_call(std::uint64_t call) {
  const Locked all;
  all->call = 0;
  all->failing_call = call;
}

bool has_failed() {
  const Locked all;
  return all->failing_call > 0 && all->call >= all->failing_call;
}

void refuse_registration(bool is_refused) {
  const Locked all;
  all->is_registration_refused = is_refused;
}

void delay_copies(std::int64_t microseconds) {
  const Locked all;
  all->delay = std::chrono::microseconds(microseconds);
}

double now() {
  const Locked all;
  return all->streams.now_s();
}

std::uint64_t pageable_copies() {
  const Locked all;
  return all->pageable_copies;
}

unsigned used_devices() {
  const Locked all;
  return all->used_devices;
}

std::size_t left_over() {
  const Locked all;
  return all->streams.alive() + all->events.size() + all->memory.count() + graph_count();
}

}  // namespace cudart

extern "C" {

// Errors and devices

cudaError_t CUDARTAPI cudaGetLastError() {
  const cudaError_t error = cudart::last_error();
  cudart::last_error() = cudaSuccess;
  return error;
}

const char* CUDARTAPI cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorUnknown ? "cudaErrorUnknown" : "another error of CUDA";
}

const char* CUDARTAPI cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "it was refused";
}

cudaError_t CUDARTAPI cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return told(cudaErrorInvalidDevice);
  cudart::current_device() = device;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  properties->totalGlobalMem = kDeviceBytes;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaMemGetInfo(std::size_t* free_bytes, std::size_t* total_bytes) {
  const Locked all;
  *free_bytes = all->memory.free_bytes();
  *total_bytes = all->memory.total_bytes();
  return cudaSuccess;
}

// Memory

cudaError_t CUDARTAPI cudaMalloc(void** base, std::size_t bytes) {
  const Locked all;
  if (spoils_recording()) return told(cudaErrorStreamCaptureUnsupported);
  *base = must_fail() ? nullptr : all->memory.make(bytes, Kind::device);
  return told(*base != nullptr, cudaErrorMemoryAllocation);
}

// The driver frees nothing that is in use.
cudaError_t CUDARTAPI cudaFree(void* base) {
  const Locked all;
  if (spoils_recording()) return told(cudaErrorStreamCaptureUnsupported);
  all->streams.wait_for_all();
  return told(all->memory.free(base, Kind::device), cudaErrorInvalidValue);
}

cudaError_t CUDARTAPI cudaHostAlloc(void** base, std::size_t bytes, unsigned) {
  const Locked all;
  if (spoils_recording()) return told(cudaErrorStreamCaptureUnsupported);
  *base = must_fail() ? nullptr : all->memory.make(bytes, Kind::pinned);
  return told(*base != nullptr, cudaErrorMemoryAllocation);
}

cudaError_t CUDARTAPI cudaFreeHost(void* base) {
  const Locked all;
  all->streams.wait_for_all();
  return told(all->memory.free(base, Kind::pinned), cudaErrorInvalidValue);
}

cudaError_t CUDARTAPI cudaHostRegister(void* base, std::size_t bytes, unsigned) {
  const Locked all;
  if (must_fail() || all->is_registration_refused) return told(cudaErrorMemoryAllocation);
  return told(all->memory.enter(base, bytes, Kind::registered),
              cudaErrorHostMemoryAlreadyRegistered);
}

// Unlike freeing, this waits for nobody.
cudaError_t CUDARTAPI cudaHostUnregister(void* base) {
  const Locked all;
  return told(all->memory.forget(base, Kind::registered), cudaErrorHostMemoryNotRegistered);
}

cudaError_t CUDARTAPI cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* base) {
  const Locked all;
  return told(!must_fail() && all->memory.share(base, *handle), cudaErrorInvalidValue);
}

cudaError_t CUDARTAPI cudaIpcOpenMemHandle(void** base, cudaIpcMemHandle_t handle, unsigned) {
  const Locked all;
  *base = must_fail() ? nullptr : all->memory.open(handle);
  return told(*base != nullptr, cudaErrorMapBufferObjectFailed);
}

cudaError_t CUDARTAPI cudaIpcCloseMemHandle(void* base) {
  const Locked all;
  all->streams.wait_for_all();
  return told(all->memory.free(base, Kind::peer), cudaErrorInvalidValue);
}

// Streams and events

cudaError_t CUDARTAPI cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  const Locked all;
  if (must_fail()) return told(cudaErrorUnknown);
  *stream = all->streams.make_stream();
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamDestroy(cudaStream_t stream) {
  const Locked all;
  if (!all->streams.is_stream(stream)) return told(cudaErrorInvalidResourceHandle);
  all->streams.destroy_stream(stream);
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamSynchronize(cudaStream_t stream) {
  const Locked all;
  if (spoils_recording()) return told(cudaErrorStreamCaptureUnsupported);
  if (!all->streams.is_stream(stream)) return told(cudaErrorInvalidResourceHandle);
  if (must_fail()) return told(cudaErrorUnknown);
  all->streams.wait(stream->last);
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const Locked all;
  if (stream->recording && spoils_recording()) return told(cudaErrorStreamCaptureUnsupported);
  if (!all->streams.is_stream(stream) || all->events.count(event) == 0) {
    return told(cudaErrorInvalidResourceHandle);
  }
  if (must_fail()) return told(cudaErrorUnknown);
  if (!event->recorded) return cudaSuccess;
  Operation pause;
  pause.after.push_back(event->recorded);
  all->streams.push(stream, std::move(pause));
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  const Locked all;
  if (must_fail()) return told(cudaErrorUnknown);
  *event = new CUevent_st;
  all->events.insert(*event);
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaEventDestroy(cudaEvent_t event) {
  const Locked all;
  if (all->events.erase(event) == 0) return told(cudaErrorInvalidResourceHandle);
  delete event;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const Locked all;
  if (stream->recording && spoils_recording()) return told(cudaErrorStreamCaptureUnsupported);
  if (!all->streams.is_stream(stream) || all->events.count(event) == 0) {
    return told(cudaErrorInvalidResourceHandle);
  }
  if (must_fail()) return told(cudaErrorUnknown);
  event->recorded = all->streams.push(stream, Operation{});
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaEventSynchronize(cudaEvent_t event) {
  const Locked all;
  if (spoils_recording()) return told(cudaErrorStreamCaptureUnsupported);
  if (all->events.count(event) == 0) return told(cudaErrorInvalidResourceHandle);
  if (must_fail()) return told(cudaErrorUnknown);
  all->streams.wait(event->recorded);
  return cudaSuccess;
}

// Work

cudaError_t CUDARTAPI cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  const Locked all;
  Kind target = Kind::pageable;
  if (!all->streams.is_stream(stream)) return told(cudaErrorInvalidResourceHandle);
  if (must_fail()) return told(cudaErrorUnknown);
  if (!all->memory.look_up(to, bytes, target) || !is_on_device(target)) {
    return told(cudaErrorInvalidValue);
  }
  Operation set;
  set.work = [=] { std::memset(to, value, bytes); };
  set.unit = Unit::inside;
  set.seconds = static_cast<double>(bytes) / kInsideBytesPerSecond;
  all->streams.push(stream, std::move(set));
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaMemcpyAsync(void* to, const void* from, std::size_t bytes,
                                      cudaMemcpyKind direction, cudaStream_t stream) {
  const Locked all;
  if (!all->streams.is_stream(stream)) return told(cudaErrorInvalidResourceHandle);
  if (must_fail()) return told(cudaErrorUnknown);
  Kind target = Kind::pageable;
  Kind source = Kind::pageable;
  if (!all->memory.look_up(to, bytes, target) || !all->memory.look_up(from, bytes, source) ||
      !fits(direction, target, source) || !are_apart(to, from, bytes)) {
    return told(cudaErrorInvalidValue);
  }
  if (target == Kind::pageable || source == Kind::pageable) ++all->pageable_copies;
  all->streams.push(stream, copy_operation(to, from, bytes, direction));
  return cudaSuccess;
}

}  // extern "C"

// The calls of the CUDA runtime that we use, on the stand-in's streams and memory: compiled against
// the toolkit's own header, linked in place of its library. Here are streams, events and work.

#include <cuda_runtime_api.h>

#include <cstring>
#include <thread>

#include "testing/cudart/graphs.h"
#include "testing/cudart/runtime.h"

namespace {

using cudart::failure;
using cudart::is_on_device;
using cudart::Kind;
using cudart::kInsideBytesPerSecond;
using cudart::Locked;
using cudart::Operation;
using cudart::runtime;
using cudart::spoils_recording;
using cudart::told;
using cudart::Unit;

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
  const double rate =
      copy.unit == Unit::inside ? kInsideBytesPerSecond : runtime().model.link_bytes_per_s;
  copy.seconds = runtime().model.copy_s + static_cast<double>(bytes) / rate;
  return copy;
}

bool are_apart(const void* to, const void* from, std::size_t bytes) {
  const auto* left = static_cast<const std::byte*>(to);
  const auto* right = static_cast<const std::byte*>(from);
  return left + bytes <= right || right + bytes <= left;
}

}  // namespace

extern "C" {

// Streams and events

cudaError_t CUDARTAPI cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  const Locked all;
  if (const cudaError_t failed = failure(); failed != cudaSuccess) return failed;
  *stream = all->streams.make_stream();
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamDestroy(cudaStream_t stream) {
  const Locked all;
  if (!all->streams.is_stream(stream)) return told(cudaErrorInvalidResourceHandle);
  const cudaError_t word = cudart::last_word();
  all->streams.destroy_stream(stream);
  return word;
}

cudaError_t CUDARTAPI cudaStreamSynchronize(cudaStream_t stream) {
  const Locked all;
  if (spoils_recording()) return told(cudaErrorStreamCaptureUnsupported);
  if (!all->streams.is_stream(stream)) return told(cudaErrorInvalidResourceHandle);
  if (const cudaError_t failed = failure(); failed != cudaSuccess) return failed;
  all->streams.wait(stream->last);
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamQuery(cudaStream_t stream) {
  const Locked all;
  if (!all->streams.is_stream(stream)) return told(cudaErrorInvalidResourceHandle);
  if (const cudaError_t failed = failure(); failed != cudaSuccess) return failed;
  return stream->queue.empty() ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t CUDARTAPI cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const Locked all;
  if (stream->recording && spoils_recording()) return told(cudaErrorStreamCaptureUnsupported);
  if (!all->streams.is_stream(stream) || all->events.count(event) == 0) {
    return told(cudaErrorInvalidResourceHandle);
  }
  if (const cudaError_t failed = failure(); failed != cudaSuccess) return failed;
  if (!event->recorded) return cudaSuccess;
  Operation pause;
  pause.after.push_back(event->recorded);
  all->streams.push(stream, std::move(pause));
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  const Locked all;
  if (const cudaError_t failed = failure(); failed != cudaSuccess) return failed;
  *event = new CUevent_st;
  all->events.insert(*event);
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaEventDestroy(cudaEvent_t event) {
  const Locked all;
  if (all->events.erase(event) == 0) return told(cudaErrorInvalidResourceHandle);
  delete event;
  return cudart::last_word();
}

cudaError_t CUDARTAPI cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const Locked all;
  if (stream->recording && spoils_recording()) return told(cudaErrorStreamCaptureUnsupported);
  if (!all->streams.is_stream(stream) || all->events.count(event) == 0) {
    return told(cudaErrorInvalidResourceHandle);
  }
  if (const cudaError_t failed = failure(); failed != cudaSuccess) return failed;
  event->recorded = all->streams.push(stream, Operation{});
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaEventSynchronize(cudaEvent_t event) {
  const Locked all;
  if (spoils_recording()) return told(cudaErrorStreamCaptureUnsupported);
  if (all->events.count(event) == 0) return told(cudaErrorInvalidResourceHandle);
  if (const cudaError_t failed = failure(); failed != cudaSuccess) return failed;
  all->streams.wait(event->recorded);
  return cudaSuccess;
}

// Work

cudaError_t CUDARTAPI cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  const Locked all;
  Kind target = Kind::pageable;
  if (!all->streams.is_stream(stream)) return told(cudaErrorInvalidResourceHandle);
  if (const cudaError_t failed = failure(); failed != cudaSuccess) return failed;
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
  if (const cudaError_t failed = failure(); failed != cudaSuccess) return failed;
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

#include "testing/cudart/runtime.h"

#include <cuda_runtime_api.h>

#include <utility>

#include "testing/cudart/control.h"
#include "testing/cudart/graphs.h"

namespace cudart {
namespace {

constexpr std::size_t kDeviceBytes = std::size_t{1} << 30;

bool is_lost() { return runtime().losing_call > 0 && runtime().call >= runtime().losing_call; }

}  // namespace

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
  ++all.call;
  if (!is_lost()) return told(all.call != all.failing_call, ordinary);
  all.streams.abandon();
  return told(cudaErrorIllegalAddress);
}

cudaError_t last_word() {
  if (!is_lost()) return cudaSuccess;
  runtime().streams.abandon();
  return told(cudaErrorIllegalAddress);
}

void reset(Order order, std::uint64_t seed) {
  const Locked all;
  all->streams.reset(order, seed);
  all->call = all->failing_call = all->losing_call = all->pageable_copies = 0;
  all->used_devices = 0;
  all->model = {};
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
  all->call = all->losing_call = 0;
  all->failing_call = call;
}

void lose_device(std::uint64_t call) {
  const Locked all;
  all->call = all->failing_call = 0;
  all->losing_call = call;
}

bool has_failed() {
  const Locked all;
  return is_lost() || (all->failing_call > 0 && all->call >= all->failing_call);
}

void refuse_registration(bool is_refused) {
  const Locked all;
  all->model.is_registration_refused = is_refused;
}

void lock_read_only(bool is_known, bool is_needless) {
  const Locked all;
  all->model.locks_read_only = is_known;
  all->model.has_host_tables = is_needless;
}

void set_capability(int major, int minor, int block_shared_bytes) {
  const Locked all;
  all->model.major = major;
  all->model.minor = minor;
  all->model.block_shared_bytes = block_shared_bytes;
}

void set_driver(int version) {
  const Locked all;
  all->model.driver = version;
}

void set_link(double bytes_per_s, double copy_s) {
  const Locked all;
  all->model.link_bytes_per_s = bytes_per_s;
  all->model.copy_s = copy_s;
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

#include "cuda/graph.h"

namespace aegaeon::cuda {
namespace {

void forgive(cudaError_t result) {
  if (result != cudaSuccess) cudaGetLastError();
}

}  // namespace

Graph::Graph(cudaGraph_t recorded) {
  const cudaError_t result = cudaGraphInstantiateWithFlags(&handle_, recorded, 0);
  forgive(cudaGraphDestroy(recorded));
  check(result, "make a graph of a recorded step");
}

Graph::~Graph() {
  if (handle_ != nullptr) forgive(cudaGraphExecDestroy(handle_));
}

Recorder::Recorder(std::shared_ptr<const Device> device)
    : device_((use_device(device->number()), std::move(device))), stream_(true) {}

Recorder::~Recorder() {
  end_with_device(device_->number());
  abandon();
}

void Recorder::begin() {
  use_device(device_->number());
  check(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal), "record a step");
  is_recording_ = true;
}

std::unique_ptr<Graph> Recorder::end() {
  cudaGraph_t recorded = nullptr;
  is_recording_ = false;
  const cudaError_t result = cudaStreamEndCapture(stream(), &recorded);
  if (result != cudaSuccess && recorded != nullptr) forgive(cudaGraphDestroy(recorded));
  check(result, "record a step");
  return std::make_unique<Graph>(recorded);
}

void Recorder::abandon() {
  if (!is_recording_) return;
  is_recording_ = false;
  cudaGraph_t recorded = nullptr;
  forgive(cudaStreamEndCapture(stream(), &recorded));
  if (recorded != nullptr) forgive(cudaGraphDestroy(recorded));
}

}  // namespace aegaeon::cuda

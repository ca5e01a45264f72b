#include "testing/cudart/graphs.h"

#include <cuda_runtime_api.h>

#include <memory>
#include <set>
#include <utility>

#include "testing/cudart/control.h"
#include "testing/cudart/runtime.h"

struct CUgraphExec_st {
  CUgraph_st graph;
};

namespace cudart {
namespace {

// Under the runtime's lock.
std::set<cudaGraph_t> graphs;
std::set<cudaGraphExec_t> executables;
bool is_refused = false;

thread_local CUstream_st* recorded_by_us = nullptr;

}  // namespace

bool spoils_recording() {
  if (recorded_by_us == nullptr) return false;
  recorded_by_us->recording->is_void = true;
  return true;
}

std::size_t graph_count() {
  const Locked all;
  return graphs.size() + executables.size();
}

void refuse_graphs(bool is_refusing) {
  const Locked all;
  is_refused = is_refusing;
}

}  // namespace cudart

extern "C" {

using cudart::failure;
using cudart::Locked;
using cudart::told;

cudaError_t CUDARTAPI cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  const Locked all;
  if (!all->streams.is_stream(stream)) return told(cudaErrorInvalidResourceHandle);
  if (const cudaError_t error = failure()) return error;
  // Of other modes, whatever other threads do would be refused as well.
  const bool is_good = mode == cudaStreamCaptureModeThreadLocal && !cudart::is_refused &&
                       cudart::recorded_by_us == nullptr && !stream->recording;
  if (!is_good) return told(cudaErrorStreamCaptureUnsupported);
  stream->recording = std::make_unique<CUgraph_st>();
  cudart::recorded_by_us = stream;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const Locked all;
  *graph = nullptr;
  if (!all->streams.is_stream(stream) || cudart::recorded_by_us != stream) {
    return told(cudaErrorIllegalState);
  }
  const std::unique_ptr<CUgraph_st> recorded = std::move(stream->recording);
  cudart::recorded_by_us = nullptr;
  if (const cudaError_t error = failure()) return error;
  if (recorded->is_void) return told(cudaErrorStreamCaptureInvalidated);
  *graph = new CUgraph_st(*recorded);
  cudart::graphs.insert(*graph);
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                                    unsigned long long) {
  const Locked all;
  *executable = nullptr;
  if (cudart::graphs.count(graph) == 0) return told(cudaErrorInvalidValue);
  if (const cudaError_t error = failure()) return error;
  *executable = new CUgraphExec_st{*graph};
  cudart::executables.insert(*executable);
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaGraphDestroy(cudaGraph_t graph) {
  const Locked all;
  if (cudart::graphs.erase(graph) == 0) return told(cudaErrorInvalidValue);
  delete graph;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaGraphExecDestroy(cudaGraphExec_t executable) {
  const Locked all;
  if (cudart::executables.erase(executable) == 0) return told(cudaErrorInvalidValue);
  delete executable;
  return cudaSuccess;
}

// As if each operation had been given to the stream anew.
cudaError_t CUDARTAPI cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  const Locked all;
  if (!all->streams.is_stream(stream) || cudart::executables.count(executable) == 0) {
    return told(cudaErrorInvalidResourceHandle);
  }
  if (const cudaError_t error = failure()) return error;
  for (const cudart::Operation& operation : executable->graph.operations) {
    all->streams.push(stream, operation);
  }
  return cudaSuccess;
}

}  // extern "C"

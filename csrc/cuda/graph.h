// Launches that are recorded once and then given to the device together.
#pragma once

#include <memory>
#include <utility>

#include "cuda/device.h"

namespace aegaeon::cuda {

// What was recorded. It goes when it does not run.
class Graph {
 public:
  explicit Graph(cudaGraph_t recorded);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  // Behind what the stream was given. Raises Error.
  void launch(cudaStream_t stream) const {
    check(cudaGraphLaunch(handle_, stream), "launch a recorded step");
  }

 private:
  cudaGraphExec_t handle_ = nullptr;
};

// A stream of its own on which steps are recorded. Never the one that computes: copies record
// events there, and whoever begins one beside would spoil the recording, or have it wait for a
// point that never comes. Of one thread at a time.
class Recorder {
 public:
  explicit Recorder(std::shared_ptr<const Device> device);
  ~Recorder();
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  cudaStream_t stream() const { return stream_.handle(); }
  // Waits until the stream has done all.
  void synchronize() const { stream_.synchronize(); }
  // What the stream is given from now on is recorded instead of done; this thread may do nothing
  // meanwhile that waits or allocates. Raises Error.
  void begin();
  // Raises Error, and then nothing is recorded any more.
  std::unique_ptr<Graph> end();
  // Gives up a recording, if one has begun.
  void abandon();

 private:
  const std::shared_ptr<const Device> device_;
  const Stream stream_;
  bool is_recording_ = false;
};

}  // namespace aegaeon::cuda

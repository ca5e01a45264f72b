// All that a step needs of the host, as bytes that one copy brings to the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "ops/cuda/step_plan.h"
#include "ops/cuda/tables.h"

namespace aegaeon::ops::cuda {

// What a pass begins with, in the host's memory.
struct HostStep {
  std::size_t rows;
  const std::int64_t* token_ids;  // [rows]
  const float* cos;               // [rows, head_dim]
  const float* sin;
  std::size_t outputs;
  const std::int64_t* chosen;  // [outputs], below `rows`
  Matrix table;                // on the device; or in the host, and then it goes up as well
  std::size_t table_bytes;     // of one in the host, else 0
};

// As many of each that all passes of a bucket have as many: launches are then alike, but for what
// is uploaded. 0: as many as there are.
struct StepBucket {
  std::size_t rows = 0;    // as many outputs; a row of each sequence
  std::size_t splits = 0;  // of 512 tokens, of the longest sequence
};

class StepUpload {
 public:
  // `kv` has to live as long. Throws what StepTables throws.
  // Attention has a workspace of `most_floats` at most.
  StepUpload(const StepPlan& plan, const HostStep& step, const PagedKv& kv, StepBucket bucket,
             std::size_t most_floats);

  std::size_t bytes() const { return total_; }
  std::size_t workspace_floats() const;
  void fill(std::byte* buffer) const;
  // With the bytes at `base` and the workspace of attention at `workspace`.
  StepInputs on_device(const std::byte* base, float* workspace) const;
  // What launches depend on beside the plan.
  std::string identity(const StepMemory& memory, const std::byte* base, float* workspace) const;

 private:
  const HostStep step_;
  const PagedKv& kv_;
  const std::size_t head_dim_;
  const std::size_t hidden_;
  const std::size_t rows_;
  const std::size_t outputs_;
  const StepTables tables_;
  // Where each begins.
  std::size_t cos_ = 0, sin_ = 0, chosen_ = 0, words_ = 0, table_ = 0, total_ = 0;
};

}  // namespace aegaeon::ops::cuda

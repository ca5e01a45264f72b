// A model's step, recorded once and replayed for any rows: operators in order, between places that
// are known before. The CPU's counterpart of a CUDA graph: nobody is asked between two operators.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "ops/cpu/thread_pool.h"
#include "ops/cpu/workspace.h"
#include "ops/ops.h"
#include "ops/step_slots.h"

namespace aegaeon::ops {

// What one pass is given.
struct StepInputs {
  std::size_t rows;
  std::vector<const float*> inputs;  // of each input slot, in their order: [rows, width]
  std::size_t outputs;
  const std::int64_t* output_rows;  // [outputs], the rows whose result is wanted, below `rows`
  const PagedKv& kv;                // of the plan's KvForm
  float* result;                    // [outputs, width of the result]
};

// Records until `finish`; then runs. It keeps nothing of a pass; the weights that it was given must
// outlive it. Operators behind `rms_norm_outputs` work on the outputs alone, and are left out of a
// pass without any.
class StepPlan {
 public:
  // Recording. Each verb adds an operator of ops.h, which says what it does, and returns the slot
  // that it makes. Throw std::invalid_argument for what does not fit together.
  Slot input(std::size_t width);
  Slot linear(const View& x, std::vector<BiasedMatrix> parts, const View* residual);
  Slot rms_norm(const View& x, std::size_t heads, const float* weight, float eps);
  Slot rms_norm_outputs(const View& x, const float* weight, float eps);
  Slot rotate(const View& x, std::size_t heads, const View& cos, const View& sin);
  Slot gated(const View& x, std::vector<BiasedMatrix> gate_up);
  void append_kv(std::size_t layer, std::size_t kv_heads, const View& keys, const View& values);
  Slot attend(std::size_t layer, std::size_t heads, const View& queries, float scale);
  // The operators that follow need the first `stages` stages of the weights.
  void need_stages(std::size_t stages) { stages_ = stages; }
  // Lays the slots out. `result` is what a pass is for: made last, of the outputs.
  void finish(Slot result);

  std::size_t inputs() const { return inputs_; }
  std::size_t operators() const { return operators_.size(); }
  // The stages that the operator `at` needs.
  std::size_t stages_of(std::size_t at) const { return operators_.at(at).stages; }
  const KvForm& kv_form() const { return slots_.kv_form(); }
  // Floats of the workspace for each row.
  std::size_t row_floats() const { return row_floats_; }

  // Runs the operators from `first` on while `stages` stages are enough; returns the first that
  // needs more, or operators(). Whoever goes on from there gives the same inputs, and the same
  // workspace, which nobody else has used meanwhile. Throws std::bad_alloc.
  std::size_t run(ThreadPool& pool, Workspace& workspace, const StepInputs& given,
                  std::size_t first, std::size_t stages) const;

 private:
  class Pass;
  // Writes its rows to `out`, which is null where it makes nothing that a later one reads.
  using Run = std::function<void(const Pass& pass, float* out)>;
  enum class Home { workspace, input, result };

  struct Place {
    Home home;
    std::size_t begin;  // in the workspace, in floats of a row; of an input, its number
  };

  struct Operator {
    Run run;
    std::vector<Slot> reads;
    Slot makes;
    std::size_t stages;
  };

  Slot add(std::size_t width, const std::vector<View>& reads, Run run);

  StepSlots slots_;
  std::vector<Place> places_;  // of each slot
  std::vector<Operator> operators_;
  std::size_t inputs_ = 0;
  std::size_t stages_ = 0;
  std::size_t row_floats_ = 0;
  bool is_finished_ = false;
};

}  // namespace aegaeon::ops

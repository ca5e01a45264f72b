// A model's step as its operators were recorded, for a CUDA device: who makes what from what.
// Nothing here knows how that is launched; see step_plan.h.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "ops/cuda/ops.h"
#include "ops/step_slots.h"

namespace aegaeon::ops::cuda {

// One of the matrices of a product; its weights are row by row, and for whoever multiplies.
struct Part {
  const void* weights;
  std::size_t outputs;
  WeightType type;
  const float* bias;  // [outputs], or null
};

enum class Kind { linear, gated, rms_norm, rotate, append_kv, attend };

// Of an operator, what its kind has.
struct Recorded {
  Kind kind;
  View x;                    // of append_kv the keys
  std::vector<View> others;  // a residual; the values; cosines and sines
  std::vector<Part> parts;
  std::size_t heads = 1;
  std::size_t layer = 0;
  const float* weight = nullptr;
  float number = 0.0F;  // eps, or a scale
  bool is_choosing = false;
  Slot makes = 0;
  std::size_t stages = 0;  // of the weights, that it needs
};

// A step has three inputs: the tokens' embeddings, cosines, sines.
constexpr std::size_t kStepInputs = 3;

// Each verb adds an operator of ops.h, which says what it does, and returns the slot that it makes.
// They throw std::invalid_argument for what does not fit together.
class StepRecord {
 public:
  Slot input(std::size_t width);
  Slot linear(const View& x, std::vector<Part> parts, const View* residual);
  Slot gated(const View& x, std::vector<Part> gate_up);
  Slot rms_norm(const View& x, std::size_t heads, const float* weight, float eps);
  // Of the rows that the step's results are wanted of; what follows works on those alone.
  Slot rms_norm_outputs(const View& x, const float* weight, float eps);
  Slot rotate(const View& x, std::size_t heads, const View& cos, const View& sin);
  void append_kv(std::size_t layer, std::size_t kv_heads, const View& keys, const View& values);
  Slot attend(std::size_t layer, std::size_t heads, const View& queries, float scale);
  // The operators that follow need the first `stages` stages of the weights.
  void need_stages(std::size_t stages) { stages_ = stages; }

  const std::vector<Recorded>& operators() const { return operators_; }
  const StepSlots& slots() const { return slots_; }
  // Of the queries, in all layers alike; none before the first `attend`.
  std::size_t heads() const { return heads_; }

 private:
  Slot add(std::size_t width, Recorded added);

  StepSlots slots_;
  std::vector<Recorded> operators_;
  std::size_t heads_ = 0;
  std::size_t stages_ = 0;
};

// All that launches depend on, as bytes: the same of two records means the same launches.
std::string identity_of(const StepRecord& record);

}  // namespace aegaeon::ops::cuda

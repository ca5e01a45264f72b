// A model's step as its operators were recorded, for a CUDA device: who makes what from what.
// Nothing here knows how that is launched; see step_plan.h.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "ops/cuda/ops.h"

namespace aegaeon::ops::cuda {

// What an operator makes, or an input of the step: rows of so many elements.
using Slot = std::size_t;

// The columns first .. first + width - 1 of a slot.
struct View {
  Slot slot;
  std::size_t first;
  std::size_t width;
};

// One of the matrices of a product; its weights are row by row, and for whoever multiplies.
struct Part {
  const void* weights;
  std::size_t outputs;
  WeightType type;
  const float* bias;  // [outputs], or null
};

// The keys and values that a step's attention is made for.
struct KvForm {
  std::size_t layers = 0;
  std::size_t kv_heads = 0;
  std::size_t head_dim = 0;
  std::size_t heads = 0;  // of queries
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

struct SlotForm {
  std::size_t width;
  bool is_of_outputs;
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
  const std::vector<SlotForm>& slots() const { return slots_; }
  const KvForm& kv_form() const { return kv_form_; }

 private:
  Slot add(std::size_t width, Recorded added);
  void check(const View& view) const;
  void check_whole(const View& view, const char* what) const;
  void check_heads(const View& view, std::size_t heads) const;

  std::vector<SlotForm> slots_;
  std::vector<Recorded> operators_;
  KvForm kv_form_;
  std::size_t stages_ = 0;
};

// All that launches depend on, as bytes: the same of two records means the same launches.
std::string identity_of(const StepRecord& record);

// Throws std::invalid_argument.
void require(bool claim, const std::string& what);

}  // namespace aegaeon::ops::cuda

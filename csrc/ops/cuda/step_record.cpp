#include "ops/cuda/step_record.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace aegaeon::ops::cuda {
namespace {

// What is divided before it meets float16 is multiplied after, in all columns alike.
void check_types(const std::vector<Part>& parts) {
  const auto is_f16 = [](const Part& part) { return part.type == WeightType::f16; };
  const bool has_f16 = std::any_of(parts.begin(), parts.end(), is_f16);
  require(!parts.empty() && parts.size() <= kMostParts, "a product has one to three parts");
  require(!has_f16 || std::all_of(parts.begin(), parts.end(), is_f16),
          "of the parts of a product all have weights of float16, or none has");
  for (const Part& part : parts) {
    require(part.type != WeightType::i8, "no product of int8 weights here; load them as bf16");
  }
}

template <typename Value>
void put(std::string& bytes, const Value& value) {
  char given[sizeof value];
  std::memcpy(given, &value, sizeof value);
  bytes.append(given, sizeof value);
}

void put_view(std::string& bytes, const View& view) {
  for (const std::size_t number : {view.slot, view.first, view.width}) put(bytes, number);
}

Recorded operator_of(Kind kind, const View& x) {
  Recorded made{kind, x, {}, {}};
  return made;
}

}  // namespace

std::string identity_of(const StepRecord& record) {
  std::string bytes;
  for (const SlotForm& slot : record.slots()) put(bytes, slot.width);
  for (const Recorded& op : record.operators()) {
    put(bytes, op.kind);
    put_view(bytes, op.x);
    for (const View& view : op.others) put_view(bytes, view);
    for (const Part& part : op.parts) {
      put(bytes, part.weights);
      put(bytes, part.outputs);
      put(bytes, part.type);
      put(bytes, part.bias);
    }
    for (const std::size_t number : {op.parts.size(), op.heads, op.layer}) put(bytes, number);
    put(bytes, op.weight);
    put(bytes, op.number);
    put(bytes, op.is_choosing);
  }
  return bytes;
}

Slot StepRecord::input(std::size_t width) {
  require(width > 0 && operators_.empty() && slots_.size() < kStepInputs,
          "a step has three inputs with columns, before its operators");
  return slots_.add({width, false});
}

Slot StepRecord::linear(const View& x, std::vector<Part> parts, const View* residual) {
  check_types(parts);
  std::size_t width = 0;
  for (const Part& part : parts) width += part.outputs;
  slots_.check_product(x, residual, width);
  Recorded added = operator_of(Kind::linear, x);
  if (residual != nullptr) added.others = {*residual};
  added.parts = std::move(parts);
  return add(width, std::move(added));
}

Slot StepRecord::gated(const View& x, std::vector<Part> gate_up) {
  slots_.check_whole(x, "what is multiplied");
  check_types(gate_up);
  require(gate_up.size() == 2 && gate_up[0].outputs == gate_up[1].outputs,
          "a gated projection has two parts of as many outputs");
  Recorded added = operator_of(Kind::gated, x);
  added.parts = std::move(gate_up);
  const std::size_t width = added.parts[0].outputs;
  return add(width, std::move(added));
}

Slot StepRecord::rms_norm(const View& x, std::size_t heads, const float* weight, float eps) {
  slots_.check_heads(x, heads);
  Recorded added = operator_of(Kind::rms_norm, x);
  added.heads = heads;
  added.weight = weight;
  added.number = eps;
  return add(x.width, std::move(added));
}

Slot StepRecord::rms_norm_outputs(const View& x, const float* weight, float eps) {
  slots_.check_choice(x);
  const Slot made = rms_norm(x, 1, weight, eps);
  operators_.back().is_choosing = true;
  slots_.choose(made);
  return made;
}

Slot StepRecord::rotate(const View& x, std::size_t heads, const View& cos, const View& sin) {
  slots_.check_rotation(x, heads, cos, sin);
  Recorded added = operator_of(Kind::rotate, x);
  added.others = {cos, sin};
  added.heads = heads;
  return add(x.width, std::move(added));
}

void StepRecord::append_kv(std::size_t layer, std::size_t kv_heads, const View& keys,
                           const View& values) {
  const KvForm form = slots_.check_kv(layer, kv_heads, keys, values);
  Recorded added = operator_of(Kind::append_kv, keys);
  added.others = {values};
  added.heads = kv_heads;
  added.layer = layer;
  add(0, std::move(added));
  slots_.keep(form);
}

Slot StepRecord::attend(std::size_t layer, std::size_t heads, const View& queries, float scale) {
  slots_.check_queries(layer, heads, queries);
  require(heads_ == 0 || heads_ == heads, "layers differ in their heads");
  heads_ = heads;
  Recorded added = operator_of(Kind::attend, queries);
  added.heads = heads;
  added.layer = layer;
  added.number = scale;
  return add(queries.width, std::move(added));
}

// As many rows as of the first that it reads; the others have as many.
Slot StepRecord::add(std::size_t width, Recorded added) {
  require(slots_.size() >= kStepInputs, "a step has three inputs");
  std::vector<View> reads{added.x};
  reads.insert(reads.end(), added.others.begin(), added.others.end());
  const bool is_of_outputs = slots_.are_of_outputs(reads);
  added.makes = slots_.add({width, is_of_outputs});
  added.stages = stages_;
  operators_.push_back(std::move(added));
  return operators_.back().makes;
}

}  // namespace aegaeon::ops::cuda

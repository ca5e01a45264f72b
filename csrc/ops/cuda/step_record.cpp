#include "ops/cuda/step_record.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
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

void require(bool claim, const std::string& what) {
  if (!claim) throw std::invalid_argument(what);
}

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
  slots_.push_back({width, false});
  return slots_.size() - 1;
}

Slot StepRecord::linear(const View& x, std::vector<Part> parts, const View* residual) {
  check_whole(x, "what is multiplied");
  check_types(parts);
  std::size_t width = 0;
  for (const Part& part : parts) width += part.outputs;
  Recorded added = operator_of(Kind::linear, x);
  if (residual != nullptr) {
    check_whole(*residual, "what is added to a product");
    require(residual->width == width, "a product and what is added to it differ in width");
    added.others = {*residual};
  }
  added.parts = std::move(parts);
  return add(width, std::move(added));
}

Slot StepRecord::gated(const View& x, std::vector<Part> gate_up) {
  check_whole(x, "what is multiplied");
  check_types(gate_up);
  require(gate_up.size() == 2 && gate_up[0].outputs == gate_up[1].outputs,
          "a gated projection has two parts of as many outputs");
  Recorded added = operator_of(Kind::gated, x);
  added.parts = std::move(gate_up);
  const std::size_t width = added.parts[0].outputs;
  return add(width, std::move(added));
}

Slot StepRecord::rms_norm(const View& x, std::size_t heads, const float* weight, float eps) {
  check_heads(x, heads);
  Recorded added = operator_of(Kind::rms_norm, x);
  added.heads = heads;
  added.weight = weight;
  added.number = eps;
  return add(x.width, std::move(added));
}

Slot StepRecord::rms_norm_outputs(const View& x, const float* weight, float eps) {
  check_heads(x, 1);
  require(!slots_[x.slot].is_of_outputs, "outputs are chosen once");
  const Slot made = rms_norm(x, 1, weight, eps);
  operators_.back().is_choosing = true;
  slots_[made].is_of_outputs = true;
  return made;
}

Slot StepRecord::rotate(const View& x, std::size_t heads, const View& cos, const View& sin) {
  check_heads(x, heads);
  const std::size_t head_dim = x.width / heads;
  require(head_dim % 2 == 0, "head_dim must be even, not " + std::to_string(head_dim));
  for (const View* angles : {&cos, &sin}) {
    check_whole(*angles, "a table of angles");
    require(angles->width == head_dim, "angles are those of another head_dim");
  }
  Recorded added = operator_of(Kind::rotate, x);
  added.others = {cos, sin};
  added.heads = heads;
  return add(x.width, std::move(added));
}

void StepRecord::append_kv(std::size_t layer, std::size_t kv_heads, const View& keys,
                           const View& values) {
  check_heads(keys, kv_heads);
  require(keys.width == values.width, "keys and values differ in width");
  const KvForm form{std::max(kv_form_.layers, layer + 1), kv_heads, keys.width / kv_heads,
                    kv_form_.heads};
  require(kv_form_.layers == 0 ||
              (kv_form_.kv_heads == form.kv_heads && kv_form_.head_dim == form.head_dim),
          "layers differ in their keys and values");
  Recorded added = operator_of(Kind::append_kv, keys);
  added.others = {values};
  added.heads = kv_heads;
  added.layer = layer;
  add(0, std::move(added));
  kv_form_ = form;
}

Slot StepRecord::attend(std::size_t layer, std::size_t heads, const View& queries, float scale) {
  check_whole(queries, "queries");
  check_heads(queries, heads);
  require(layer < kv_form_.layers, "keys and values are appended before they are attended to");
  require(heads % kv_form_.kv_heads == 0 && queries.width / heads == kv_form_.head_dim,
          "heads do not fit the keys and values");
  require(kv_form_.heads == 0 || kv_form_.heads == heads, "layers differ in their heads");
  kv_form_.heads = heads;
  Recorded added = operator_of(Kind::attend, queries);
  added.heads = heads;
  added.layer = layer;
  added.number = scale;
  return add(queries.width, std::move(added));
}

// As many rows as of the first that it reads; the others have as many.
Slot StepRecord::add(std::size_t width, Recorded added) {
  require(slots_.size() >= kStepInputs, "a step has three inputs");
  check(added.x);
  const bool is_of_outputs = slots_[added.x.slot].is_of_outputs;
  for (const View& view : added.others) {
    check(view);
    require(slots_[view.slot].is_of_outputs == is_of_outputs,
            "an operator reads of all rows or of the outputs, not of both");
  }
  added.makes = slots_.size();
  added.stages = stages_;
  slots_.push_back({width, is_of_outputs});
  operators_.push_back(std::move(added));
  return slots_.size() - 1;
}

void StepRecord::check(const View& view) const {
  require(view.slot < slots_.size(), "no slot " + std::to_string(view.slot));
  const std::size_t width = slots_[view.slot].width;
  require(view.width > 0 && view.width <= width && view.first <= width - view.width,
          "columns " + std::to_string(view.first) + " and " + std::to_string(view.width) +
              " more of a slot of " + std::to_string(width));
}

void StepRecord::check_whole(const View& view, const char* what) const {
  check(view);
  require(view.width == slots_[view.slot].width,
          std::string(what) + " must lie row behind row, not in columns of wider ones");
}

void StepRecord::check_heads(const View& view, std::size_t heads) const {
  check(view);
  require(heads > 0 && view.width % heads == 0,
          std::to_string(heads) + " heads share " + std::to_string(view.width) + " columns");
}

}  // namespace aegaeon::ops::cuda

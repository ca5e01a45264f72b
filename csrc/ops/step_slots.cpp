#include "ops/step_slots.h"

#include <algorithm>
#include <stdexcept>

namespace aegaeon::ops {

void require(bool claim, const std::string& what) {
  if (!claim) throw std::invalid_argument(what);
}

Slot StepSlots::add(const SlotForm& form) {
  forms_.push_back(form);
  return forms_.size() - 1;
}

void StepSlots::check(const View& view) const {
  require(view.slot < forms_.size(), "no slot " + std::to_string(view.slot));
  const std::size_t width = forms_[view.slot].width;
  require(view.width > 0 && view.width <= width && view.first <= width - view.width,
          "columns " + std::to_string(view.first) + " and " + std::to_string(view.width) +
              " more of a slot of " + std::to_string(width));
}

void StepSlots::check_whole(const View& view, const char* what) const {
  check(view);
  require(view.width == forms_[view.slot].width,
          std::string(what) + " must lie row behind row, not in columns of wider ones");
}

void StepSlots::check_heads(const View& view, std::size_t heads) const {
  check(view);
  require(heads > 0 && view.width % heads == 0,
          std::to_string(heads) + " heads share " + std::to_string(view.width) + " columns");
}

void StepSlots::check_product(const View& x, const View* residual, std::size_t width) const {
  check_whole(x, "what is multiplied");
  if (residual == nullptr) return;
  check_whole(*residual, "what is added to a product");
  require(residual->width == width, "a product and what is added to it differ in width");
}

void StepSlots::check_rotation(const View& x, std::size_t heads, const View& cos,
                               const View& sin) const {
  check_heads(x, heads);
  const std::size_t head_dim = x.width / heads;
  require(head_dim % 2 == 0, "head_dim must be even, not " + std::to_string(head_dim));
  for (const View* angles : {&cos, &sin}) {
    check_whole(*angles, "a table of angles");
    require(angles->width == head_dim, "angles are those of another head_dim");
  }
}

KvForm StepSlots::check_kv(std::size_t layer, std::size_t kv_heads, const View& keys,
                           const View& values) const {
  check_heads(keys, kv_heads);
  require(keys.width == values.width, "keys and values differ in width");
  const KvForm form{std::max(kv_form_.layers, layer + 1), kv_heads, keys.width / kv_heads};
  require(kv_form_.layers == 0 ||
              (kv_form_.kv_heads == form.kv_heads && kv_form_.head_dim == form.head_dim),
          "layers differ in their keys and values");
  return form;
}

void StepSlots::check_queries(std::size_t layer, std::size_t heads, const View& queries) const {
  check_whole(queries, "queries");
  check_heads(queries, heads);
  require(layer < kv_form_.layers, "keys and values are appended before they are attended to");
  require(heads % kv_form_.kv_heads == 0 && queries.width / heads == kv_form_.head_dim,
          "heads do not fit the keys and values");
}

void StepSlots::check_choice(const View& x) const {
  check(x);
  require(!forms_[x.slot].is_of_outputs, "outputs are chosen once");
}

bool StepSlots::are_of_outputs(const std::vector<View>& reads) const {
  for (const View& view : reads) {
    check(view);
    require(forms_[view.slot].is_of_outputs == forms_[reads[0].slot].is_of_outputs,
            "an operator reads of all rows or of the outputs, not of both");
  }
  return forms_[reads[0].slot].is_of_outputs;
}

}  // namespace aegaeon::ops

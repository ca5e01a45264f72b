#include "ops/cpu/step_plan.h"

#include <algorithm>
#include <cassert>
#include <stdexcept>
#include <string>
#include <utility>

#include "ops/slot_layout.h"

namespace aegaeon::ops {
namespace {

void require(bool claim, const std::string& what) {
  if (!claim) throw std::invalid_argument(what);
}

}  // namespace

// The slots of a plan during one pass.
class StepPlan::Pass {
 public:
  Pass(const StepPlan& plan, ThreadPool& threads, Workspace& workspace, const StepInputs& inputs)
      : pool(threads),
        given(inputs),
        places_(plan.places_),
        rows_(std::max(inputs.rows, inputs.outputs)),
        memory_(workspace.reserve(plan.row_floats_ * rows_)) {}

  ThreadPool& pool;
  const StepInputs& given;

  std::size_t rows(const View& view) const {
    return places_[view.slot].is_of_outputs ? given.outputs : given.rows;
  }

  Rows of(const View& view) const {
    const Place& place = places_[view.slot];
    return {(place.home == Home::input ? given.inputs[place.begin] : made(view.slot)) + view.first,
            place.width};
  }

  // Where an operator writes.
  float* made(Slot slot) const {
    const Place& place = places_[slot];
    return place.home == Home::result ? given.result : memory_ + place.begin * rows_;
  }

 private:
  const std::vector<Place>& places_;
  const std::size_t rows_;
  float* const memory_;
};

Slot StepPlan::input(std::size_t width) {
  require(width > 0 && operators_.empty(), "inputs have columns and come before operators");
  places_.push_back({width, false, Home::input, inputs_++});
  return places_.size() - 1;
}

Slot StepPlan::linear(const View& x, std::vector<BiasedMatrix> parts, const View* residual) {
  std::size_t width = 0;
  for (const BiasedMatrix& part : parts) width += part.matrix.out_features;
  std::vector<View> reads{x};
  check_whole(x, "what is multiplied");
  if (residual != nullptr) {
    check_whole(*residual, "what is added to a product");
    require(residual->width == width, "a product and what is added to it differ in width");
    reads.push_back(*residual);
  }
  return add(width, reads, [reads, parts = std::move(parts)](const Pass& pass, float* out) {
    const float* const added = reads.size() > 1 ? pass.of(reads[1]).first : nullptr;
    ops::linear(pass.pool, {pass.of(reads[0]).first, pass.rows(reads[0]), reads[0].width,
                            parts.data(), parts.size(), added, out});
  });
}

Slot StepPlan::rms_norm(const View& x, std::size_t heads, const float* weight, float eps) {
  check_heads(x, heads);
  return add(x.width, {x}, [=](const Pass& pass, float* out) {
    ops::rms_norm(pass.pool,
                  {pass.of(x), pass.rows(x), heads, x.width / heads, weight, eps, out, nullptr});
  });
}

Slot StepPlan::rms_norm_outputs(const View& x, const float* weight, float eps) {
  check_heads(x, 1);
  require(!places_[x.slot].is_of_outputs, "outputs are chosen once");
  const Slot made = add(x.width, {x}, [=](const Pass& pass, float* out) {
    ops::rms_norm(pass.pool, {pass.of(x), pass.given.outputs, 1, x.width, weight, eps, out,
                              pass.given.output_rows});
  });
  places_[made].is_of_outputs = true;
  return made;
}

Slot StepPlan::rotate(const View& x, std::size_t heads, const View& cos, const View& sin) {
  check_heads(x, heads);
  const std::size_t head_dim = x.width / heads;
  require(head_dim % 2 == 0, "head_dim must be even, not " + std::to_string(head_dim));
  for (const View* angles : {&cos, &sin}) {
    check_whole(*angles, "a table of angles");
    require(angles->width == head_dim, "angles are those of another head_dim");
  }
  return add(x.width, {x, cos, sin}, [=](const Pass& pass, float* out) {
    ops::rotate(pass.pool, {pass.of(x), pass.rows(x), heads, head_dim, pass.of(cos).first,
                            pass.of(sin).first, out});
  });
}

Slot StepPlan::gated(const View& x, std::vector<BiasedMatrix> gate_up) {
  check_whole(x, "what is multiplied");
  assert(gate_up.size() == 2 && gate_up[0].matrix.out_features == gate_up[1].matrix.out_features);
  const std::size_t width = gate_up[0].matrix.out_features;
  return add(width, {x}, [x, gate_up = std::move(gate_up)](const Pass& pass, float* out) {
    ops::gated(pass.pool, {pass.of(x).first, pass.rows(x), x.width, gate_up.data(), out});
  });
}

void StepPlan::append_kv(std::size_t layer, std::size_t kv_heads, const View& keys,
                         const View& values) {
  check_heads(keys, kv_heads);
  require(keys.width == values.width, "keys and values differ in width");
  KvForm form{std::max(kv_form_.layers, layer + 1), kv_heads, keys.width / kv_heads};
  require(kv_form_.layers == 0 ||
              (kv_form_.kv_heads == form.kv_heads && kv_form_.head_dim == form.head_dim),
          "layers differ in their keys and values");
  add(0, {keys, values}, [=](const Pass& pass, float*) {
    ops::append_kv(pass.pool, {pass.given.kv, layer, pass.of(keys), pass.of(values)});
  });
  kv_form_ = form;
}

Slot StepPlan::attend(std::size_t layer, std::size_t heads, const View& queries, float scale) {
  check_whole(queries, "queries");
  check_heads(queries, heads);
  require(layer < kv_form_.layers, "keys and values are appended before they are attended to");
  require(heads % kv_form_.kv_heads == 0 && queries.width / heads == kv_form_.head_dim,
          "heads do not fit the keys and values");
  return add(queries.width, {queries}, [=](const Pass& pass, float* out) {
    ops::attend(pass.pool, {pass.given.kv, layer, heads, pass.of(queries).first, scale, out});
  });
}

void StepPlan::finish(Slot result) {
  require(!is_finished_ && !operators_.empty() && operators_.back().makes == result &&
              places_[result].is_of_outputs,
          "a plan ends with its result, which is of the outputs");
  std::vector<Lifetime> lifetimes;
  std::vector<std::size_t> last(places_.size());
  for (std::size_t at = 0; at < operators_.size(); ++at) {
    for (const Slot slot : operators_[at].reads) last[slot] = at;
  }
  places_[result].home = Home::result;
  for (std::size_t at = 0; at < operators_.size(); ++at) {
    const Slot slot = operators_[at].makes;
    const std::size_t width = slot == result ? 0 : places_[slot].width;
    lifetimes.push_back({width, at, std::max(at, last[slot])});
  }
  const SlotLayout layout = lay_out(lifetimes);
  for (std::size_t at = 0; at < operators_.size(); ++at) {
    places_[operators_[at].makes].begin = layout.begins[at];
  }
  row_floats_ = layout.width;
  is_finished_ = true;
}

std::size_t StepPlan::run(ThreadPool& pool, Workspace& workspace, const StepInputs& given,
                          std::size_t first, std::size_t stages) const {
  require(is_finished_, "a plan is finished before it runs");
  const Pass pass(*this, pool, workspace, given);
  for (std::size_t at = first; at < operators_.size(); ++at) {
    const Operator& next = operators_[at];
    if (places_[next.makes].is_of_outputs && given.outputs == 0) continue;
    if (next.stages > stages) return at;
    next.run(pass, pass.made(next.makes));
  }
  return operators_.size();
}

// As many rows as of the first that it reads; the others have as many.
Slot StepPlan::add(std::size_t width, const std::vector<View>& reads, Run run) {
  require(!is_finished_, "a plan that is finished takes no more operators");
  Operator added{std::move(run), {}, places_.size(), stages_};
  for (const View& view : reads) {
    check(view);
    require(places_[view.slot].is_of_outputs == places_[reads[0].slot].is_of_outputs,
            "an operator reads of all rows or of the outputs, not of both");
    added.reads.push_back(view.slot);
  }
  places_.push_back({width, places_[reads[0].slot].is_of_outputs, Home::workspace, 0});
  operators_.push_back(std::move(added));
  return places_.size() - 1;
}

void StepPlan::check(const View& view) const {
  require(view.slot < places_.size(), "no slot " + std::to_string(view.slot));
  const std::size_t width = places_[view.slot].width;
  require(view.width > 0 && view.width <= width && view.first <= width - view.width,
          "columns " + std::to_string(view.first) + " and " + std::to_string(view.width) +
              " more of a slot of " + std::to_string(width));
}

void StepPlan::check_whole(const View& view, const char* what) const {
  check(view);
  require(view.width == places_[view.slot].width,
          std::string(what) + " must lie row behind row, not in columns of wider ones");
}

void StepPlan::check_heads(const View& view, std::size_t heads) const {
  check(view);
  require(heads > 0 && view.width % heads == 0,
          std::to_string(heads) + " heads share " + std::to_string(view.width) + " columns");
}

}  // namespace aegaeon::ops

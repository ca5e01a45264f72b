#include "ops/cpu/step_plan.h"

#include <algorithm>
#include <cassert>
#include <utility>

#include "ops/slot_layout.h"

namespace aegaeon::ops {

// The slots of a plan during one pass.
class StepPlan::Pass {
 public:
  Pass(const StepPlan& plan, ThreadPool& threads, Workspace& workspace, const StepInputs& inputs)
      : pool(threads),
        given(inputs),
        slots_(plan.slots_),
        places_(plan.places_),
        rows_(std::max(inputs.rows, inputs.outputs)),
        memory_(workspace.reserve(plan.row_floats_ * rows_)) {}

  ThreadPool& pool;
  const StepInputs& given;

  std::size_t rows(const View& view) const {
    return slots_[view.slot].is_of_outputs ? given.outputs : given.rows;
  }

  Rows of(const View& view) const {
    const Place& place = places_[view.slot];
    return {(place.home == Home::input ? given.inputs[place.begin] : made(view.slot)) + view.first,
            slots_[view.slot].width};
  }

  // Where an operator writes.
  float* made(Slot slot) const {
    const Place& place = places_[slot];
    return place.home == Home::result ? given.result : memory_ + place.begin * rows_;
  }

 private:
  const StepSlots& slots_;
  const std::vector<Place>& places_;
  const std::size_t rows_;
  float* const memory_;
};

Slot StepPlan::input(std::size_t width) {
  require(width > 0 && operators_.empty(), "inputs have columns and come before operators");
  places_.push_back({Home::input, inputs_++});
  return slots_.add({width, false});
}

Slot StepPlan::linear(const View& x, std::vector<BiasedMatrix> parts, const View* residual) {
  std::size_t width = 0;
  for (const BiasedMatrix& part : parts) width += part.matrix.out_features;
  slots_.check_product(x, residual, width);
  std::vector<View> reads{x};
  if (residual != nullptr) reads.push_back(*residual);
  return add(width, reads, [reads, parts = std::move(parts)](const Pass& pass, float* out) {
    const float* const added = reads.size() > 1 ? pass.of(reads[1]).first : nullptr;
    ops::linear(pass.pool, {pass.of(reads[0]).first, pass.rows(reads[0]), reads[0].width,
                            parts.data(), parts.size(), added, out});
  });
}

Slot StepPlan::rms_norm(const View& x, std::size_t heads, const float* weight, float eps) {
  slots_.check_heads(x, heads);
  return add(x.width, {x}, [=](const Pass& pass, float* out) {
    ops::rms_norm(pass.pool,
                  {pass.of(x), pass.rows(x), heads, x.width / heads, weight, eps, out, nullptr});
  });
}

Slot StepPlan::rms_norm_outputs(const View& x, const float* weight, float eps) {
  slots_.check_choice(x);
  const Slot made = add(x.width, {x}, [=](const Pass& pass, float* out) {
    ops::rms_norm(pass.pool, {pass.of(x), pass.given.outputs, 1, x.width, weight, eps, out,
                              pass.given.output_rows});
  });
  slots_.choose(made);
  return made;
}

Slot StepPlan::rotate(const View& x, std::size_t heads, const View& cos, const View& sin) {
  slots_.check_rotation(x, heads, cos, sin);
  const std::size_t head_dim = x.width / heads;
  return add(x.width, {x, cos, sin}, [=](const Pass& pass, float* out) {
    ops::rotate(pass.pool, {pass.of(x), pass.rows(x), heads, head_dim, pass.of(cos).first,
                            pass.of(sin).first, out});
  });
}

Slot StepPlan::gated(const View& x, std::vector<BiasedMatrix> gate_up) {
  slots_.check_whole(x, "what is multiplied");
  assert(gate_up.size() == 2 && gate_up[0].matrix.out_features == gate_up[1].matrix.out_features);
  const std::size_t width = gate_up[0].matrix.out_features;
  return add(width, {x}, [x, gate_up = std::move(gate_up)](const Pass& pass, float* out) {
    ops::gated(pass.pool, {pass.of(x).first, pass.rows(x), x.width, gate_up.data(), out});
  });
}

void StepPlan::append_kv(std::size_t layer, std::size_t kv_heads, const View& keys,
                         const View& values) {
  const KvForm form = slots_.check_kv(layer, kv_heads, keys, values);
  add(0, {keys, values}, [=](const Pass& pass, float*) {
    ops::append_kv(pass.pool, {pass.given.kv, layer, pass.of(keys), pass.of(values)});
  });
  slots_.keep(form);
}

Slot StepPlan::attend(std::size_t layer, std::size_t heads, const View& queries, float scale) {
  slots_.check_queries(layer, heads, queries);
  return add(queries.width, {queries}, [=](const Pass& pass, float* out) {
    ops::attend(pass.pool, {pass.given.kv, layer, heads, pass.of(queries).first, scale, out});
  });
}

void StepPlan::finish(Slot result) {
  require(!is_finished_ && !operators_.empty() && operators_.back().makes == result &&
              slots_[result].is_of_outputs,
          "a plan ends with its result, which is of the outputs");
  std::vector<Lifetime> lifetimes;
  std::vector<std::size_t> last(places_.size());
  for (std::size_t at = 0; at < operators_.size(); ++at) {
    for (const Slot slot : operators_[at].reads) last[slot] = at;
  }
  places_[result].home = Home::result;
  for (std::size_t at = 0; at < operators_.size(); ++at) {
    const Slot slot = operators_[at].makes;
    const std::size_t width = slot == result ? 0 : slots_[slot].width;
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
  const ThreadPool::Computing computing(pool);
  const Pass pass(*this, pool, workspace, given);
  for (std::size_t at = first; at < operators_.size(); ++at) {
    const Operator& next = operators_[at];
    if (slots_[next.makes].is_of_outputs && given.outputs == 0) continue;
    if (next.stages > stages) return at;
    next.run(pass, pass.made(next.makes));
  }
  return operators_.size();
}

// As many rows as of the first that it reads; the others have as many.
Slot StepPlan::add(std::size_t width, const std::vector<View>& reads, Run run) {
  require(!is_finished_, "a plan that is finished takes no more operators");
  const bool is_of_outputs = slots_.are_of_outputs(reads);
  Operator added{std::move(run), {}, slots_.add({width, is_of_outputs}), stages_};
  for (const View& view : reads) added.reads.push_back(view.slot);
  places_.push_back({Home::workspace, 0});
  operators_.push_back(std::move(added));
  return operators_.back().makes;
}

}  // namespace aegaeon::ops

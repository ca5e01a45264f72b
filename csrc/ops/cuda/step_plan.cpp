#include "ops/cuda/step_plan.h"

#include <algorithm>

#include "ops/slot_layout.h"

namespace aegaeon::ops::cuda {

std::size_t StepPass::count_of(Slot slot) const {
  return plan.place(slot).is_of_outputs ? given.outputs : given.rows;
}

void* StepPass::at(Slot slot) const {
  const Place& place = plan.place(slot);
  switch (place.home) {
    case Home::slots:
      return memory.slots + place.begin * sizeof(float) * memory.slot_rows;
    case Home::result:
      return memory.result;
    case Home::upload:
      break;
  }
  return const_cast<float*>(slot == 1 ? given.cos : given.sin);  // that only kernels read
}

Rows StepPass::rows_of(const View& view) const {
  return {floats(view.slot) + view.first, plan.place(view.slot).width};
}

StepPlan::StepPlan(const StepRecord& record, Slot result)
    : lowered_(lower(record, result)),
      kv_form_(record.slots().kv_form()),
      heads_(record.heads()),
      result_width_(record.slots()[result].width),
      head_dim_(record.slots()[1].width) {
  lay_out_slots();
}

void StepPlan::lay_out_slots() {
  std::vector<Place>& places = lowered_.places;
  std::vector<Lifetime> lifetimes(places.size(), Lifetime{0, 0, 0});
  std::vector<bool> is_made(places.size(), false);
  for (std::size_t at = 0; at < lowered_.launches.size(); ++at) {
    const Launch& launch = lowered_.launches[at];
    for (const Slot slot : launch.makes) {
      if (!is_made[slot]) lifetimes[slot].first = at;
      is_made[slot] = true;
      lifetimes[slot].last = at;
    }
    for (const Slot slot : launch.reads) lifetimes[slot].last = at;
  }
  for (Slot slot = 0; slot < places.size(); ++slot) {
    const Place& place = places[slot];
    if (place.home != Home::slots || !is_made[slot]) continue;
    const std::size_t halves = place.type == WeightType::f32 ? 2 : 1;
    lifetimes[slot].width = (place.width * halves + 1) / 2;
  }
  const SlotLayout layout = lay_out(lifetimes);
  for (Slot slot = 0; slot < places.size(); ++slot) places[slot].begin = layout.begins[slot];
  row_floats_ = layout.width;
}

std::size_t StepPlan::run(const StepPass& pass, std::size_t first, std::size_t stages) const {
  for (std::size_t at = first; at < launches(); ++at) {
    const Launch& next = lowered_.launches[at];
    if (next.is_of_outputs && pass.given.outputs == 0) continue;
    if (next.stages > stages || !next.run) return at;
    next.run(pass);
  }
  return launches();
}

}  // namespace aegaeon::ops::cuda

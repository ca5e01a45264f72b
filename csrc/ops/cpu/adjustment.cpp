#include "ops/adjustment.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace aegaeon::ops {

Adjustment::Adjustment(const Penalties& penalties, const Bias& bias,
                       const std::vector<std::uint32_t>& prompt)
    : penalties_(penalties) {
  if (!(penalties.repetition > 0)) throw std::invalid_argument("a repetition penalty is over 0");
  for (const auto& [id, added] : bias) entry_of(id).bias += added;
  if (penalties_.repetition == 1) return;
  for (const std::uint32_t id : prompt) entry_of(id).is_repeated = true;
}

void Adjustment::count(std::uint32_t id) {
  const Penalties& off = penalties_;
  if (off.repetition == 1 && off.presence == 0 && off.frequency == 0) return;
  Entry& entry = entry_of(id);
  entry.is_repeated = true;
  ++entry.made;
}

void Adjustment::apply(float* logits, std::size_t vocab) const {
  constexpr double kFurthest = std::numeric_limits<float>::max();
  for (const Entry& entry : entries_) {
    if (entry.id >= vocab) continue;
    double value = logits[entry.id];
    if (entry.is_repeated) {
      value = value > 0 ? value / penalties_.repetition : value * penalties_.repetition;
    }
    if (entry.made > 0) value -= penalties_.presence;
    value -= penalties_.frequency * static_cast<double>(entry.made);
    value += entry.bias;
    logits[entry.id] = static_cast<float>(std::clamp(value, -kFurthest, kFurthest));
  }
}

Adjustment::Entry& Adjustment::entry_of(std::uint32_t id) {
  const auto [place, is_new] = places_.try_emplace(id, entries_.size());
  if (is_new) entries_.push_back({id, false, 0, 0.0});
  return entries_[place->second];
}

}  // namespace aegaeon::ops

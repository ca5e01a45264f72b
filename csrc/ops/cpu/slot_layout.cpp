#include "ops/cpu/slot_layout.h"

#include <algorithm>

namespace aegaeon::ops {
namespace {

constexpr std::size_t kUnit = 16;

struct Taken {
  std::size_t begin;
  std::size_t end;
  std::size_t last;
};

// Takes the lowest gap of `width`; `taken` is in the order of begins.
std::size_t take(std::vector<Taken>& taken, std::size_t width, std::size_t last) {
  std::size_t begin = 0;
  auto next = taken.begin();
  for (; next != taken.end() && next->begin < begin + width; ++next) begin = next->end;
  taken.insert(next, {begin, begin + width, last});
  return begin;
}

}  // namespace

SlotLayout lay_out(const std::vector<Lifetime>& slots) {
  SlotLayout layout;
  std::vector<Taken> taken;
  for (const Lifetime& slot : slots) {
    // What the operator reads for the last time is still needed beside what it makes.
    const auto is_over = [&](const Taken& other) { return other.last < slot.first; };
    taken.erase(std::remove_if(taken.begin(), taken.end(), is_over), taken.end());
    const std::size_t width = (slot.width + kUnit - 1) / kUnit * kUnit;
    layout.begins.push_back(take(taken, width, slot.last));
    layout.width = std::max(layout.width, layout.begins.back() + width);
  }
  return layout;
}

}  // namespace aegaeon::ops

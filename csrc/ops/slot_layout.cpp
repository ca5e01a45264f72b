#include "ops/slot_layout.h"

#include <algorithm>
#include <numeric>

namespace aegaeon::ops {
namespace {

constexpr std::size_t kUnit = 16;

struct Taken {
  std::size_t begin;
  std::size_t end;
  Lifetime slot;
};

// What the operator reads for the last time is still needed beside what it makes.
bool are_together(const Lifetime& one, const Lifetime& other) {
  return one.first <= other.last && other.first <= one.last;
}

// Takes the lowest gap of `width`; `taken` is in the order of begins.
std::size_t take(std::vector<Taken>& taken, std::size_t width, const Lifetime& slot) {
  std::size_t begin = 0;
  for (const Taken& other : taken) {
    if (!are_together(slot, other.slot) || other.end <= begin) continue;
    if (other.begin >= begin + width) break;
    begin = other.end;
  }
  const auto is_before = [](const Taken& other, std::size_t at) { return other.begin < at; };
  taken.insert(std::lower_bound(taken.begin(), taken.end(), begin, is_before),
               {begin, begin + width, slot});
  return begin;
}

}  // namespace

SlotLayout lay_out(const std::vector<Lifetime>& slots) {
  SlotLayout layout;
  layout.begins.resize(slots.size());
  std::vector<std::size_t> order(slots.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t one, std::size_t other) {
    return slots[one].width > slots[other].width;
  });
  std::vector<Taken> taken;
  for (const std::size_t at : order) {
    const std::size_t width = (slots[at].width + kUnit - 1) / kUnit * kUnit;
    if (width == 0) continue;
    layout.begins[at] = take(taken, width, slots[at]);
    layout.width = std::max(layout.width, layout.begins[at] + width);
  }
  return layout;
}

}  // namespace aegaeon::ops

// Which slots of a plan share memory: those that are never needed together.
#pragma once

#include <cstddef>
#include <vector>

namespace aegaeon::ops {

// A slot is made by the operator `first` and read for the last time by the operator `last`.
struct Lifetime {
  std::size_t width;
  std::size_t first;
  std::size_t last;
};

struct SlotLayout {
  std::vector<std::size_t> begins;  // of each slot
  std::size_t width = 0;            // of all together
};

// The widest slot first, each goes to the lowest gap among those that are needed when it is: in the
// order of `first`, narrow ones would lie where wide ones fit no more. Begins are multiples of 16,
// so that slots of any rows of floats begin at a line of the cache.
SlotLayout lay_out(const std::vector<Lifetime>& slots);

}  // namespace aegaeon::ops

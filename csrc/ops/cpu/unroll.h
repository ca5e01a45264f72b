// Loops whose index is a constant in each of their rounds.
#pragma once

#include <cstddef>

namespace aegaeon::ops {

template <std::size_t value>
struct Index {
  static constexpr std::size_t at = value;
};

// Calls work(Index<0>), work(Index<1>) ... with `count` constants: only arrays that are indexed by
// constants throughout are kept in registers.
template <std::size_t count, typename Work>
[[gnu::always_inline]] inline void unroll(const Work& work) {
  if constexpr (count > 0) {
    unroll<count - 1>(work);
    work(Index<count - 1>{});
  }
}

}  // namespace aegaeon::ops

// Memory that a thread keeps from call to call, as large as it ever was:
// aegaeon/memory/workspace.py counts it in what a pass takes.
#pragma once

#include <cstddef>
#include <vector>

namespace aegaeon::ops {

// Makes `memory` at least `count` long and returns where it begins; what was there is lost.
template <typename T>
T* at_least(std::vector<T>& memory, std::size_t count) {
  if (memory.size() < count) {
    memory = std::vector<T>();  // first, so that both are never there at once
    memory.resize(count);
  }
  return memory.data();
}

}  // namespace aegaeon::ops

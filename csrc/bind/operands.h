// What operators are given: addresses, and rows that lie apart.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "ops/ops.h"

namespace aegaeon {

using Address = std::uintptr_t;
using Strided = std::pair<Address, std::size_t>;  // first row, floats from row to row

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline ops::Rows rows_of(const Strided& rows) {
  return {pointer<const float>(rows.first), rows.second};
}

}  // namespace aegaeon

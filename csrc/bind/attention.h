// append_kv and attend, and the PagedRows that both take.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <stdexcept>
#include <string>

#include "ops/ops.h"

namespace aegaeon {

// What the operators trust is checked here, once per pass.
struct PagedRows {
  ops::PagedKv kv;
  std::size_t layers = 0;
  std::size_t rows = 0;  // that a pass has at least

  // Throws std::out_of_range and std::invalid_argument.
  void check(std::size_t layer, std::size_t given_rows) const {
    if (layer >= layers) {
      throw std::out_of_range("layer " + std::to_string(layer) + " of " + std::to_string(layers));
    }
    if (given_rows < rows) {
      throw std::invalid_argument(std::to_string(given_rows) +
                                  " rows are given, the sequences have " + std::to_string(rows));
    }
  }
  // Throws std::invalid_argument for a type that the CPU's operators do not have.
  const ops::PagedKv& on_cpu() const {
    if (kv.type == ops::KvType::f16) {
      throw std::invalid_argument("float16 keys and values are for CUDA; the CPU has 0 and 1");
    }
    return kv;
  }
};

void bind_attention(pybind11::module_& module);

}  // namespace aegaeon

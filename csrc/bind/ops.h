// The operators of ops/ and their thread pool.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "ops/ops.h"

namespace aegaeon {

// The parts of a projection of so many columns: (address, outputs, type code, address of biases or
// 0) each. Throws std::invalid_argument for what no operator takes.
std::vector<ops::BiasedMatrix> projection_of(const pybind11::tuple& parts, std::size_t columns);
// The same of a gated one, which has two parts of as many outputs.
std::vector<ops::BiasedMatrix> gated_projection_of(const pybind11::tuple& parts,
                                                   std::size_t columns);

void bind_ops(pybind11::module_& module);

}  // namespace aegaeon

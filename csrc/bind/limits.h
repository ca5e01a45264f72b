// What benchmarks measure the limits of processor and memory by.
#pragma once

#include <pybind11/pybind11.h>

namespace aegaeon {

void bind_limits(pybind11::module_& module);

}  // namespace aegaeon

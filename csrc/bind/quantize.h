// The rounding of weights to int8, as memory/ has it.
#pragma once

#include <pybind11/pybind11.h>

namespace aegaeon {

void bind_quantize(pybind11::module_& module);

}  // namespace aegaeon

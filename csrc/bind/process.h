// Process functions of the binding: what Python's os module lacks.
#pragma once

#include <pybind11/pybind11.h>

namespace aegaeon {

void bind_process(pybind11::module_& module);

}  // namespace aegaeon

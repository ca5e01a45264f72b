// The operators of ops/ and their thread pool.
#pragma once

#include <pybind11/pybind11.h>

namespace aegaeon {

void bind_ops(pybind11::module_& module);

}  // namespace aegaeon

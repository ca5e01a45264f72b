// The recorded step and its workspace.
#pragma once

#include <pybind11/pybind11.h>

namespace aegaeon {

void bind_step_plan(pybind11::module_& module);

}  // namespace aegaeon

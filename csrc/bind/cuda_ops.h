// What a CUDA device does for a step: drawing tokens, and the steps themselves (cuda_step.h).
#pragma once

#include <pybind11/pybind11.h>

namespace aegaeon {

void bind_cuda_ops(pybind11::module_& module);

}  // namespace aegaeon

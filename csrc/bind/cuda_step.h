// Recorded steps on a CUDA device: CudaStepPlan, CudaPass, and what they are run with.
#pragma once

#include <pybind11/pybind11.h>

namespace aegaeon {

void bind_cuda_step(pybind11::module_& module);

}  // namespace aegaeon

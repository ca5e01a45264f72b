// CUDA devices as _native.CudaDevice and what it makes; in a build without CUDA, who says why not.
#pragma once

#include <pybind11/pybind11.h>

namespace aegaeon {

void bind_cuda(pybind11::module_& module);

}  // namespace aegaeon

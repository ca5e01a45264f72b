// The operators of ops/cuda/ops.h as functions _native.cuda_*, on the stream that computes.
#pragma once

#include <pybind11/pybind11.h>

namespace aegaeon {

void bind_cuda_ops(pybind11::module_& module);

}  // namespace aegaeon

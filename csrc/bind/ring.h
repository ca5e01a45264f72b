// shm::Ring as _native.Ring, and unlink.
#pragma once

#include <pybind11/pybind11.h>

namespace aegaeon {

void bind_ring(pybind11::module_& module);

}  // namespace aegaeon

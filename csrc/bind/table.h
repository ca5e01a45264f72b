// shm::Table as _native.Table.
#pragma once

#include <pybind11/pybind11.h>

namespace aegaeon {

void bind_table(pybind11::module_& module);

}  // namespace aegaeon

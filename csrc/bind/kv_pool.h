// memory::KvPool as _native.KvPool.
#pragma once

#include <pybind11/pybind11.h>

namespace aegaeon {

void bind_kv_pool(pybind11::module_& module);

}  // namespace aegaeon

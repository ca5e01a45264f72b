// memory::WeightCache and CachedModel as _native.WeightCache and _native.CachedModel.
#pragma once

#include <pybind11/pybind11.h>

namespace aegaeon {

void bind_weight_cache(pybind11::module_& module);

}  // namespace aegaeon

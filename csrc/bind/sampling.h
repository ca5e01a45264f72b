// The operators on logits.
#pragma once

#include <pybind11/pybind11.h>

namespace aegaeon {

void bind_sampling(pybind11::module_& module);

}  // namespace aegaeon

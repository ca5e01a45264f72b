// append_kv and attend, and the PagedRows that both take.
#pragma once

#include <pybind11/pybind11.h>

namespace aegaeon {

void bind_attention(pybind11::module_& module);

}  // namespace aegaeon

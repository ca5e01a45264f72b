// copy::Engine as _native.CopyEngine, copy::Ticket as _native.CopyTicket.
#pragma once

#include <pybind11/pybind11.h>

namespace aegaeon {

void bind_copy(pybind11::module_& module);

}  // namespace aegaeon

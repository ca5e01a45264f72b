// copy::Engine as _native.CopyEngine, copy::Ticket as _native.CopyTicket.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "copy/engine.h"

namespace aegaeon {

void bind_copy(pybind11::module_& module);

// An engine of another backend as _native.CopyEngine.
pybind11::object cast_copy_engine(std::shared_ptr<copy::Engine> engine);

}  // namespace aegaeon

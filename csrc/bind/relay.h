// The relay of streams as _native.StreamRelay, StreamLine and TokenVocabulary.
#pragma once

#include <pybind11/pybind11.h>

namespace aegaeon {

void bind_relay(pybind11::module_& module);

}  // namespace aegaeon

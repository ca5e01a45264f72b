#include <pybind11/pybind11.h>

#include "bind/process.h"

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native parts of aegaeon: shared memory and process control.";
  aegaeon::bind_process(module);
}

#include <pybind11/pybind11.h>

#include "bind/errors.h"
#include "bind/process.h"
#include "bind/ring.h"
#include "bind/table.h"

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native parts of aegaeon: shared memory and process control.";
  aegaeon::bind_errors();
  aegaeon::bind_process(module);
  aegaeon::bind_ring(module);
  aegaeon::bind_table(module);
}

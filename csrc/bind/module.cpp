#include <pybind11/pybind11.h>

#include "bind/copy.h"
#include "bind/cuda.h"
#include "bind/errors.h"
#include "bind/kv_pool.h"
#include "bind/ops.h"
#include "bind/process.h"
#include "bind/quantize.h"
#include "bind/relay.h"
#include "bind/ring.h"
#include "bind/table.h"
#include "bind/weight_cache.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native parts of aegaeon: shared memory, weights, copies, operators, processes.";
  if (!aegaeon::find_error_classes()) {
    throw py::error_already_set();
  }
  py::register_local_exception_translator(&aegaeon::translate_error);
  module.def("die_with_parent", &aegaeon::die_with_parent, py::arg("signal"),
             py::arg("parent_pid") = 0);
  aegaeon::bind_ops(module);
  aegaeon::bind_copy(module);
  aegaeon::bind_relay(module);
  aegaeon::bind_ring(module);
  aegaeon::bind_table(module);
  aegaeon::bind_weight_cache(module);
  aegaeon::bind_quantize(module);
  aegaeon::bind_kv_pool(module);
  aegaeon::bind_cuda(module);
}

#include "ops/limits.h"

#include "bind/limits.h"
#include "bind/operands.h"
#include "ops/cpu/thread_pool.h"

namespace py = pybind11;

namespace aegaeon {
namespace {

std::uint64_t read_words(ops::ThreadPool& pool, Address address, std::size_t size_bytes) {
  const py::gil_scoped_release released;
  return ops::read_words(pool, pointer<const std::uint64_t>(address),
                         size_bytes / sizeof(std::uint64_t));
}

}  // namespace

void bind_limits(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> released;
  module.def("read_words", &read_words, py::arg("pool"), py::arg("address"), py::arg("size_bytes"));
  module.def("multiply_add", &ops::multiply_add, released, py::arg("pool"), py::arg("rounds"));
  module.def("multiply_add_pairs", &ops::multiply_add_pairs, released, py::arg("pool"),
             py::arg("rounds"));
  module.def("fork_join", &ops::fork_join, released, py::arg("pool"), py::arg("rounds"));
}

}  // namespace aegaeon

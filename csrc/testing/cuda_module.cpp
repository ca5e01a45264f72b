// What _native has of CUDA as a module of its own, on the stand-in for the runtime and the
// emulation of kernels: so that Python's side runs without a device. One unit, which compiles
// faster.

#include "bind/copy.cpp"
#include "bind/cuda.cpp"
#include "bind/cuda_ops.cpp"
#include "bind/errors.h"
#include "testing/cudart/control.h"

PYBIND11_MODULE(cuda_stand_in, module) {
  py::module_::import("aegaeon._native");  // whose types it gives and takes
  if (!aegaeon::find_error_classes()) {
    throw py::error_already_set();
  }
  py::register_local_exception_translator(&aegaeon::translate_error);
  aegaeon::bind_cuda(module);
  module.def("reset", [](int order) { cudart::reset(static_cast<cudart::Order>(order)); });
  module.def("refuse_registration", &cudart::refuse_registration);
  module.def("fail_call", &cudart::fail_call);
  module.def("lose_device", &cudart::lose_device);
  module.def("has_failed", &cudart::has_failed);
  module.def("lock_read_only", &cudart::lock_read_only);
  module.def("set_capability", &cudart::set_capability);
  module.def("set_driver", &cudart::set_driver);
  module.def("set_link", &cudart::set_link);
  module.def("now_s", &cudart::now);
  module.def("left_over", &cudart::left_over);
  module.def("pageable_copies", &cudart::pageable_copies);
}

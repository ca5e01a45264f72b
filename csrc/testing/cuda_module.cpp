// What _native has of CUDA as a module of its own, on the stand-in for the runtime and the
// emulation of kernels: so that Python's side runs without a device. One unit, which compiles
// faster.

#include <array>
#include <cstdint>

#include "bind/copy.cpp"
#include "bind/cuda.cpp"
#include "bind/cuda_ops.cpp"
#include "bind/cuda_step.cpp"
#include "bind/errors.h"
#include "cuda/sticky.h"
#include "testing/cudart/control.h"
#include "testing/emulation/block.h"
#include "testing/emulation/products.h"

namespace {

// On the stream, as a device's library does.
void multiply(std::uintptr_t stream, std::array<std::uintptr_t, 3> places,
              std::array<std::size_t, 3> shape, int type, std::size_t out_stride) {
  using namespace aegaeon::emulation;
  const MultiplyParams params = {
      reinterpret_cast<const void*>(places[0]), shape[0],  shape[1],
      reinterpret_cast<const void*>(places[1]), shape[2],  static_cast<FactorType>(type),
      reinterpret_cast<float*>(places[2]),      out_stride};
  cudart::enqueue(reinterpret_cast<CUstream_st*>(stream),
                  [params] { aegaeon::emulation::multiply(params); });
}

}  // namespace

PYBIND11_MODULE(cuda_stand_in, module) {
  py::module_::import("aegaeon._native");  // whose types it gives and takes
  if (!aegaeon::find_error_classes()) {
    throw py::error_already_set();
  }
  py::register_local_exception_translator(&aegaeon::translate_error);
  aegaeon::bind_cuda(module);
  aegaeon::emulation::stream_queue() = &cudart::enqueue;
  module.def("multiply", &multiply, py::call_guard<py::gil_scoped_release>());
  module.def(
      "reset",
      [](int order, std::uint64_t seed) { cudart::reset(static_cast<cudart::Order>(order), seed); },
      py::arg("order"), py::arg("seed") = 1);
  module.def("refuse_registration", &cudart::refuse_registration);
  module.def("fail_call", &cudart::fail_call);
  module.def("lose_device", &cudart::lose_device);
  module.def("has_failed", &cudart::has_failed);
  module.def("is_sticky",
             [](int code) { return aegaeon::cuda::is_sticky(static_cast<cudaError_t>(code)); });
  module.def("lock_read_only", &cudart::lock_read_only);
  module.def("set_capability", &cudart::set_capability);
  module.def("set_driver", &cudart::set_driver);
  module.def("set_link", &cudart::set_link);
  module.def("now_s", &cudart::now);
  module.def("refuse_graphs", &cudart::refuse_graphs);
  module.def("left_over", &cudart::left_over);
  module.def("pageable_copies", &cudart::pageable_copies);
}

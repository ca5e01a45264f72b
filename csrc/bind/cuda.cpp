#include "bind/cuda.h"

#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "cuda/errors.h"

namespace py = pybind11;

#if defined(AEGAEON_CUDA)

#include "bind/copy.h"
#include "bind/cuda_ops.h"
#include "copy/engine.h"
#include "cuda/copies.h"
#include "cuda/device.h"
#include "ops/cuda/ops.h"

namespace aegaeon {
namespace {

std::uintptr_t address_of(const void* place) { return reinterpret_cast<std::uintptr_t>(place); }

std::size_t attend_shared_bytes(std::size_t head_dim, int type) {
  return ops::cuda::attend_shared_bytes(static_cast<ops::KvType>(type), head_dim);
}

py::object make_copy_engine(const std::shared_ptr<cuda::Device>& device, std::size_t chunk_bytes) {
  std::shared_ptr<copy::Engine> engine;
  {
    const py::gil_scoped_release without_gil;
    engine = copy::Engine::start({1, chunk_bytes, 0, true},
                                 std::make_unique<cuda::CopyBackend>(device, chunk_bytes));
  }
  return cast_copy_engine(std::move(engine));
}

struct HostBytes {
  void* base;
  std::size_t bytes;
};

std::string pin_host(cuda::Device& device, HostBytes memory, bool is_read_only,
                     const py::object& is_wanted) {
  cuda::Wanted asked;
  if (!is_wanted.is_none()) {
    asked = [&is_wanted] {
      const py::gil_scoped_acquire with_gil;
      return is_wanted().cast<bool>();
    };
  }
  const py::gil_scoped_release without_gil;
  return device.pin(memory.base, memory.bytes, is_read_only, asked);
}

// Known to this module alone: tests have another one with the same, on a stand-in.
void bind_memory(py::module_& module) {
  py::class_<cuda::Memory, std::shared_ptr<cuda::Memory>, memory::DeviceBytes>(module, "CudaMemory",
                                                                               py::module_local())
      .def_property_readonly("address",
                             [](const cuda::Memory& self) { return address_of(self.base()); })
      .def_property_readonly("size_bytes", &cuda::Memory::bytes)
      .def_property_readonly("number", [](const cuda::Memory& self) { return self.device(); })
      .def("handle", [](const cuda::Memory& self) {
        std::string handle;
        {
          const py::gil_scoped_release without_gil;
          handle = self.handle();
        }
        return py::bytes(handle);
      });
  py::class_<cuda::Peer, std::shared_ptr<cuda::Peer>>(module, "CudaPeer", py::module_local())
      .def_property_readonly("address",
                             [](const cuda::Peer& self) { return address_of(self.base()); });
}

void bind_pins(py::class_<cuda::Device, std::shared_ptr<cuda::Device>>& device) {
  using cuda::Device;
  device
      .def(
          "pin",
          [](Device& self, std::uintptr_t address, std::size_t size_bytes, bool is_read_only,
             const py::object& is_wanted) {
            return pin_host(self, {reinterpret_cast<void*>(address), size_bytes}, is_read_only,
                            is_wanted);
          },
          py::arg("address"), py::arg("size_bytes"), py::arg("is_read_only") = false,
          py::arg("is_wanted") = py::none())
      .def(
          "unpin",
          [](Device& self, std::uintptr_t address) {
            self.unpin(reinterpret_cast<void*>(address));
          },
          py::arg("address"), py::call_guard<py::gil_scoped_release>());
}

void bind_device(py::module_& module) {
  using cuda::Device;
  using released = py::call_guard<py::gil_scoped_release>;
  py::class_<Device, std::shared_ptr<Device>> device(module, "CudaDevice", py::module_local());
  device.def(py::init<int>(), py::arg("number"), released())
      .def_property_readonly("number", &Device::number)
      .def_property_readonly("stream",
                             [](const Device& self) { return address_of(self.compute()); })
      .def_property_readonly(
          "free_bytes",
          py::cpp_function([](const Device& self) { return self.memory().free_bytes; }, released()))
      .def_property_readonly(
          "total_bytes",
          py::cpp_function([](const Device& self) { return self.memory().total_bytes; },
                           released()))
      .def_property_readonly("capability", &Device::capability)
      .def_property_readonly("block_shared_bytes", &Device::block_shared_bytes)
      .def("check", &Device::check_alive, released())
      .def("synchronize", &Device::synchronize, released())
      .def(
          "allocate",
          [](std::shared_ptr<Device> self, std::size_t size_bytes) {
            return std::make_shared<cuda::Memory>(std::move(self), size_bytes);
          },
          py::arg("size_bytes"), released())
      .def(
          "open",
          [](std::shared_ptr<Device> self, const std::string& handle, std::size_t size_bytes) {
            return std::make_shared<cuda::Peer>(std::move(self), handle, size_bytes);
          },
          py::arg("handle"), py::arg("size_bytes"), released())
      .def("copy_engine", &make_copy_engine, py::arg("chunk_bytes"));
  bind_pins(device);
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.attr("has_cuda") = true;
  module.def("count_cuda_devices", &cuda::count_devices);
  module.def("cuda_total_bytes", &cuda::total_bytes, py::arg("number"));
  module.def("cuda_attend_shared_bytes", &attend_shared_bytes, py::arg("head_dim"),
             py::arg("type"));
  module.def("cuda_stage_bytes", &cuda::stage_bytes, py::arg("chunk_bytes"));
  bind_memory(module);
  bind_device(module);
  bind_cuda_ops(module);
}

}  // namespace aegaeon

#else

namespace aegaeon {
namespace {

[[noreturn]] void refuse() {
  throw cuda::Error(
      "this build has no CUDA; install the CUDA toolkit (nvcc), then install aegaeon again with "
      "AEGAEON_CUDA=1, or serve with --device cpu");
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.attr("has_cuda") = false;
  module.def("count_cuda_devices", [] { refuse(); });
  module.def("cuda_total_bytes", [](int) { refuse(); }, py::arg("number"));
  module.def("CudaDevice", [](int) { refuse(); }, py::arg("number"));
  // Names that Python's side mentions in what it takes: nobody ever has one.
  for (const char* name : {"CudaMemory", "CudaPeer"}) module.attr(name) = py::none();
}

}  // namespace aegaeon

#endif

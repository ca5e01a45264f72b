#include "bind/cuda_ops.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/attention.h"
#include "bind/draws.h"
#include "bind/operands.h"
#include "cuda/device.h"
#include "ops/cuda/ops.h"
#include "ops/cuda/sampling.h"
#include "ops/cuda/tables.h"

namespace py = pybind11;

namespace aegaeon {
namespace {

using cuda::Device;

// Each launches and returns: the stream is behind, so nothing waits that would keep the GIL.

void cuda_embed(const Device& device, Address token_ids, std::pair<std::size_t, std::size_t> shape,
                std::tuple<Address, std::size_t, int> table, Address out) {
  const auto [address, vocab, type] = table;
  const ops::Matrix matrix{pointer<const void>(address), vocab, static_cast<ops::WeightType>(type)};
  ops::cuda::embed(device.compute(), {pointer<const std::int64_t>(token_ids), shape.first,
                                      shape.second, matrix, pointer<float>(out)});
}

void cuda_rms_norm(const Device& device, Strided x, std::array<std::size_t, 3> shape,
                   Address weight, float eps, Address out) {
  ops::cuda::rms_norm(device.compute(),
                      {rows_of(x), shape[0], shape[1], shape[2], pointer<const float>(weight), eps,
                       pointer<float>(out), nullptr});
}

void cuda_rotate(const Device& device, Strided x, std::array<std::size_t, 3> shape,
                 std::pair<Address, Address> angles, Address out) {
  ops::cuda::rotate(device.compute(),
                    {rows_of(x), shape[0], shape[1], shape[2], pointer<const float>(angles.first),
                     pointer<const float>(angles.second), pointer<float>(out)});
}

void cuda_silu_mul(const Device& device, Strided gate, Strided up,
                   std::pair<std::size_t, std::size_t> shape, Address out) {
  ops::cuda::silu_mul(device.compute(),
                      {rows_of(gate), rows_of(up), shape.first, shape.second, pointer<float>(out)});
}

// What the draws of a pass's tokens are on the device, and the room there that drawing takes.
class CudaDraws {
 public:
  CudaDraws(const std::vector<DrawTuple>& draws, LogitShape shape) : shape_(shape) {
    check_logits(shape, draws.size());
    draws_.reserve(draws.size());
    for (const DrawTuple& draw : draws) draws_.push_back(ops::cuda::device_draw(draw_of(draw)));
  }

  std::size_t workspace_bytes() const {
    return ops::cuda::sample_workspace_bytes(shape_.first, shape_.second);
  }
  py::buffer_info bytes() const {
    return {const_cast<std::uint8_t*>(reinterpret_cast<const std::uint8_t*>(draws_.data())),
            static_cast<py::ssize_t>(draws_.size() * sizeof(ops::cuda::DeviceDraw))};
  }
  // `places`: of the bytes and of the workspace.
  void sample(const Device& device, Address logits, std::pair<Address, Address> places,
              Address tokens) const {
    ops::cuda::sample(device.compute(),
                      {pointer<const float>(logits), shape_.first, shape_.second,
                       pointer<const ops::cuda::DeviceDraw>(places.first),
                       pointer<std::int64_t>(tokens), pointer<void>(places.second)});
  }

 private:
  const LogitShape shape_;
  std::vector<ops::cuda::DeviceDraw> draws_;
};

// What one pass needs to know of its keys and values: words for the device, and where they are
// there once `place` was told.
class CudaTables {
 public:
  CudaTables(const PagedRows& rows, std::size_t heads)
      : rows_(rows), heads_(heads), tables_(rows.kv, heads) {
    if (heads == 0 || heads % rows.kv.kv_heads != 0) {
      throw std::invalid_argument(std::to_string(heads) + " heads share " +
                                  std::to_string(rows.kv.kv_heads) + " KV heads unevenly");
    }
  }

  std::size_t workspace_floats() const {
    return ops::cuda::workspace_floats(tables_.bounds(), rows_.kv);
  }
  void place(Address words, Address workspace) {
    on_device_ = {pointer<const std::int32_t>(words), tables_.bounds(), pointer<float>(workspace)};
  }
  py::buffer_info words() const {
    return {const_cast<std::int32_t*>(tables_.words().data()),
            static_cast<py::ssize_t>(tables_.words().size())};
  }

  void append_kv(const Device& device, std::size_t layer, std::size_t count, Strided keys,
                 Strided values) const {
    check(layer, count);
    ops::cuda::append_kv(device.compute(), on_device_,
                         {rows_.kv, layer, rows_of(keys), rows_of(values)});
  }
  void attend(const Device& device, std::size_t layer, std::pair<Address, std::size_t> queries,
              float scale, Address out) const {
    check(layer, queries.second);
    ops::cuda::attend(
        device.compute(), on_device_,
        {rows_.kv, layer, heads_, pointer<const float>(queries.first), scale, pointer<float>(out)});
  }

 private:
  void check(std::size_t layer, std::size_t count) const {
    rows_.check(layer, count);
    if (on_device_.words == nullptr) {
      throw std::invalid_argument("the tables are not on the device yet; place them");
    }
  }

  const PagedRows rows_;
  const std::size_t heads_;
  const ops::cuda::StepTables tables_;
  ops::cuda::DeviceTables on_device_{};
};

}  // namespace

void bind_cuda_ops(py::module_& module) {
  module.def("cuda_embed", &cuda_embed);
  module.def("cuda_rms_norm", &cuda_rms_norm);
  module.def("cuda_rotate", &cuda_rotate);
  module.def("cuda_silu_mul", &cuda_silu_mul);
  py::class_<CudaDraws>(module, "CudaDraws", py::module_local(), py::buffer_protocol())
      .def(py::init<const std::vector<DrawTuple>&, LogitShape>(), py::arg("draws"),
           py::arg("shape"))
      .def_buffer(&CudaDraws::bytes)
      .def_property_readonly("workspace_bytes", &CudaDraws::workspace_bytes)
      .def("sample", &CudaDraws::sample);
  py::class_<CudaTables>(module, "CudaTables", py::module_local(), py::buffer_protocol())
      .def(py::init<const PagedRows&, std::size_t>(), py::arg("rows"), py::arg("heads"))
      .def_buffer(&CudaTables::words)
      .def_property_readonly("workspace_floats", &CudaTables::workspace_floats)
      .def("place", &CudaTables::place, py::arg("words"), py::arg("workspace"))
      .def("append_kv", &CudaTables::append_kv)
      .def("attend", &CudaTables::attend);
}

}  // namespace aegaeon

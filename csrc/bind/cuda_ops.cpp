#include "bind/cuda_ops.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "bind/cuda_step.h"
#include "bind/draws.h"
#include "bind/operands.h"
#include "cuda/device.h"
#include "cuda/exchange.h"
#include "ops/cuda/sampling.h"

namespace py = pybind11;

namespace aegaeon {
namespace {

constexpr std::size_t kAlignment = 16;

std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// How the tokens of a pass are drawn. What that takes of the device lies in one piece: draws,
// tokens, the workspace.
class CudaDraws {
 public:
  CudaDraws(const std::vector<DrawTuple>& draws, LogitShape shape) : shape_(shape) {
    check_logits(shape, draws.size());
    draws_.reserve(draws.size());
    for (const DrawTuple& draw : draws) draws_.push_back(ops::cuda::device_draw(draw_of(draw)));
  }

  std::size_t room_bytes() const {
    return workspace() + ops::cuda::sample_workspace_bytes(shape_.first, shape_.second);
  }

  // Waits for the tokens, and so for all that the device computes.
  std::vector<std::int64_t> sample(const cuda::Device& device, cuda::Exchange& exchange,
                                   Address logits, Address room) const {
    auto* const base = pointer<std::byte>(room);
    exchange.send(base, draw_bytes(),
                  [this](std::byte* to) { std::memcpy(to, draws_.data(), draw_bytes()); });
    auto* const tokens = reinterpret_cast<std::int64_t*>(base + aligned(draw_bytes()));
    ops::cuda::sample(device.compute(), {pointer<const float>(logits), shape_.first, shape_.second,
                                         reinterpret_cast<const ops::cuda::DeviceDraw*>(base),
                                         tokens, base + workspace()});
    std::vector<std::int64_t> drawn(draws_.size());
    const std::byte* const come = exchange.fetch(base + aligned(draw_bytes()), token_bytes());
    std::memcpy(drawn.data(), come, token_bytes());
    return drawn;
  }

 private:
  std::size_t draw_bytes() const { return draws_.size() * sizeof(ops::cuda::DeviceDraw); }
  std::size_t token_bytes() const { return draws_.size() * sizeof(std::int64_t); }
  std::size_t workspace() const { return aligned(draw_bytes()) + aligned(token_bytes()); }

  const LogitShape shape_;
  std::vector<ops::cuda::DeviceDraw> draws_;
};

}  // namespace

void bind_cuda_ops(py::module_& module) {
  py::class_<CudaDraws>(module, "CudaDraws", py::module_local())
      .def(py::init<const std::vector<DrawTuple>&, LogitShape>(), py::arg("draws"),
           py::arg("shape"))
      .def_property_readonly("room_bytes", &CudaDraws::room_bytes)
      .def("sample", &CudaDraws::sample, py::call_guard<py::gil_scoped_release>());
  bind_cuda_step(module);
}

}  // namespace aegaeon

#include "ops/ops.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bind/attention.h"
#include "bind/limits.h"
#include "bind/operands.h"
#include "bind/ops.h"
#include "bind/sampling.h"
#include "bind/step_plan.h"
#include "ops/cpu/isa.h"
#include "ops/cpu/thread_pool.h"

namespace py = pybind11;

namespace aegaeon {
namespace {

using Shape = std::pair<std::size_t, std::size_t>;

// Weights of bf16 that meet x as bf16; what is below is an ops::WeightType.
constexpr int kBf16Products = 4;

ops::Matrix matrix_of(const py::handle& part, std::size_t columns) {
  const auto fields = py::reinterpret_borrow<py::tuple>(part);
  const int type = fields[2].cast<int>();
  if (type < 0 || type > kBf16Products) {
    throw std::invalid_argument("weight type " + std::to_string(type) + " is none of 0 to " +
                                std::to_string(kBf16Products));
  }
  const Address address = fields[0].cast<Address>();
  if (address % 64 != 0) {
    throw std::invalid_argument("weights must be 64-byte aligned; pack them again");
  }
  ops::Matrix matrix{pointer<const void>(address), fields[1].cast<std::size_t>(),
                     static_cast<ops::WeightType>(type)};
  if (type == kBf16Products) {
    matrix.type = ops::WeightType::bf16;
    matrix.x_type = ops::XType::bf16;
  }
  if (matrix.type == ops::WeightType::bf16 && columns % 2 != 0) {
    throw std::invalid_argument("tiles of bf16 have pairs of inputs, not " +
                                std::to_string(columns) + "; pack them as float32");
  }
  return matrix;
}

void linear(ops::ThreadPool& pool, Address x, Shape shape, const py::tuple& parts, Address out,
            Address residual) {
  const std::vector<ops::BiasedMatrix> matrices = projection_of(parts, shape.second);
  const py::gil_scoped_release released;
  ops::linear(pool, {pointer<const float>(x), shape.first, shape.second, matrices.data(),
                     matrices.size(), pointer<const float>(residual), pointer<float>(out)});
}

void gated(ops::ThreadPool& pool, Address x, Shape shape, const py::tuple& parts, Address out) {
  const std::vector<ops::BiasedMatrix> matrices = gated_projection_of(parts, shape.second);
  const py::gil_scoped_release released;
  ops::gated(pool, {pointer<const float>(x), shape.first, shape.second, matrices.data(),
                    pointer<float>(out)});
}

void embed(ops::ThreadPool& pool, Address token_ids, Shape shape, const py::tuple& table,
           Address out) {
  const ops::Matrix matrix = matrix_of(table, shape.second);
  const py::gil_scoped_release released;
  ops::embed(pool, {pointer<const std::int64_t>(token_ids), shape.first, shape.second, matrix,
                    pointer<float>(out)});
}

void rms_norm(ops::ThreadPool& pool, Strided x, std::array<std::size_t, 3> shape, Address weight,
              float eps, Address out) {
  const py::gil_scoped_release released;
  ops::rms_norm(pool, {rows_of(x), shape[0], shape[1], shape[2], pointer<const float>(weight), eps,
                       pointer<float>(out), nullptr});
}

void rotate(ops::ThreadPool& pool, Strided x, std::array<std::size_t, 3> shape,
            std::pair<Address, Address> angles, Address out) {
  if (shape[2] % 2 != 0) {
    throw std::invalid_argument("head_dim must be even, not " + std::to_string(shape[2]));
  }
  const py::gil_scoped_release released;
  ops::rotate(pool, {rows_of(x), shape[0], shape[1], shape[2], pointer<const float>(angles.first),
                     pointer<const float>(angles.second), pointer<float>(out)});
}

void bind_elementwise(py::module_& module) {
  module.def("rms_norm", &rms_norm, py::arg("pool"), py::arg("x"), py::arg("shape"),
             py::arg("weight"), py::arg("eps"), py::arg("out"));
  module.def("rotate", &rotate, py::arg("pool"), py::arg("x"), py::arg("shape"), py::arg("angles"),
             py::arg("out"));
}

}  // namespace

std::vector<ops::BiasedMatrix> projection_of(const py::tuple& parts, std::size_t columns) {
  if (columns == 0) throw std::invalid_argument("a product needs at least 1 column");
  std::vector<ops::BiasedMatrix> matrices;
  matrices.reserve(parts.size());
  for (const py::handle part : parts) {
    const auto bias = py::reinterpret_borrow<py::tuple>(part)[3].cast<Address>();
    matrices.push_back({matrix_of(part, columns), pointer<const float>(bias)});
  }
  return matrices;
}

std::vector<ops::BiasedMatrix> gated_projection_of(const py::tuple& parts, std::size_t columns) {
  std::vector<ops::BiasedMatrix> matrices = projection_of(parts, columns);
  if (matrices.size() != 2 || matrices[0].matrix.out_features != matrices[1].matrix.out_features) {
    throw std::invalid_argument("a gated projection has two parts of as many outputs");
  }
  return matrices;
}

void bind_ops(py::module_& module) {
  py::class_<ops::ThreadPool>(module, "ThreadPool")
      .def(py::init([](unsigned threads, const std::string& neighbours, std::size_t seat) {
             if (threads < 1) throw std::invalid_argument("a pool needs at least 1 thread");
             auto shared =
                 neighbours.empty() ? nullptr : std::make_unique<ops::Neighbours>(neighbours, seat);
             return std::make_unique<ops::ThreadPool>(threads, std::move(shared));
           }),
           py::arg("threads"), py::arg("neighbours") = "", py::arg("seat") = 0)
      .def_property_readonly("threads", &ops::ThreadPool::threads);
  module.def("linear", &linear, py::arg("pool"), py::arg("x"), py::arg("shape"), py::arg("parts"),
             py::arg("out"), py::arg("residual") = 0);
  module.def("gated", &gated, py::arg("pool"), py::arg("x"), py::arg("shape"), py::arg("parts"),
             py::arg("out"));
  module.def("embed", &embed, py::arg("pool"), py::arg("token_ids"), py::arg("shape"),
             py::arg("table"), py::arg("out"));
  bind_elementwise(module);
  bind_attention(module);
  bind_step_plan(module);
  bind_limits(module);
  bind_sampling(module);
  module.def("force_isa", &ops::force_isa, py::arg("name"));
  module.def("current_isa", [] { return std::string(ops::isa_name()); });
}

}  // namespace aegaeon

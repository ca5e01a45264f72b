#include "bind/step_plan.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/attention.h"
#include "bind/operands.h"
#include "bind/ops.h"
#include "ops/cpu/step_plan.h"

namespace py = pybind11;

namespace aegaeon {
namespace {

using Columns = std::array<std::size_t, 3>;  // slot, first column, columns
// Rows, the addresses of the inputs, (outputs, address of their rows), the address of the result.
using Given =
    std::tuple<std::size_t, std::vector<Address>, std::pair<std::size_t, Address>, Address>;

ops::View view_of(const Columns& columns) { return {columns[0], columns[1], columns[2]}; }

void check_form(const ops::StepPlan& plan, const PagedRows& kv, std::size_t rows) {
  const ops::KvForm& form = plan.kv_form();
  if (form.layers == 0) return;
  kv.check(form.layers - 1, rows);
  if (kv.kv.kv_heads != form.kv_heads || kv.kv.head_dim != form.head_dim) {
    throw std::invalid_argument("the plan is for " + std::to_string(form.kv_heads) +
                                " KV heads of " + std::to_string(form.head_dim) +
                                ", the pages are not");
  }
}

ops::StepInputs inputs_of(const ops::StepPlan& plan, const PagedRows& kv, const Given& given) {
  const auto& [rows, addresses, outputs, result] = given;
  check_form(plan, kv, rows);
  if (addresses.size() != plan.inputs()) {
    throw std::invalid_argument("the plan has " + std::to_string(plan.inputs()) + " inputs");
  }
  std::vector<const float*> inputs;
  for (const Address address : addresses) inputs.push_back(pointer<const float>(address));
  const auto* const output_rows = pointer<const std::int64_t>(outputs.second);
  for (std::size_t at = 0; at < outputs.first; ++at) {
    if (output_rows[at] < 0 || static_cast<std::size_t>(output_rows[at]) >= rows) {
      throw std::out_of_range("row " + std::to_string(output_rows[at]) + " of " +
                              std::to_string(rows));
    }
  }
  return {rows, std::move(inputs), outputs.first, output_rows, kv.on_cpu(), pointer<float>(result)};
}

// Runs from the operator `progress.first` on while `progress.second` stages are enough.
std::size_t run_plan(const ops::StepPlan& plan, ops::ThreadPool& pool, ops::Workspace& workspace,
                     const PagedRows& kv, const Given& given,
                     std::pair<std::size_t, std::size_t> progress) {
  const ops::StepInputs inputs = inputs_of(plan, kv, given);
  const py::gil_scoped_release released;
  return plan.run(pool, workspace, inputs, progress.first, progress.second);
}

ops::Slot add_linear(ops::StepPlan& plan, const Columns& x, const py::tuple& parts,
                     const std::optional<Columns>& residual) {
  if (!residual) return plan.linear(view_of(x), projection_of(parts, x[2]), nullptr);
  const ops::View added = view_of(*residual);
  return plan.linear(view_of(x), projection_of(parts, x[2]), &added);
}

ops::Slot add_rms_norm(ops::StepPlan& plan, const Columns& x, std::size_t heads, Address weight,
                       float eps) {
  return plan.rms_norm(view_of(x), heads, pointer<const float>(weight), eps);
}

ops::Slot add_rms_norm_outputs(ops::StepPlan& plan, const Columns& x, Address weight, float eps) {
  return plan.rms_norm_outputs(view_of(x), pointer<const float>(weight), eps);
}

ops::Slot add_rotate(ops::StepPlan& plan, const Columns& x, std::size_t heads, const Columns& cos,
                     const Columns& sin) {
  return plan.rotate(view_of(x), heads, view_of(cos), view_of(sin));
}

ops::Slot add_gated(ops::StepPlan& plan, const Columns& x, const py::tuple& parts) {
  return plan.gated(view_of(x), gated_projection_of(parts, x[2]));
}

void add_append_kv(ops::StepPlan& plan, std::size_t layer, std::size_t kv_heads,
                   const Columns& keys, const Columns& values) {
  plan.append_kv(layer, kv_heads, view_of(keys), view_of(values));
}

ops::Slot add_attend(ops::StepPlan& plan, std::size_t layer, std::size_t heads,
                     const Columns& queries, float scale) {
  return plan.attend(layer, heads, view_of(queries), scale);
}

}  // namespace

void bind_step_plan(py::module_& module) {
  py::class_<ops::Workspace>(module, "Workspace")
      .def(py::init<>())
      .def_property_readonly("bytes", &ops::Workspace::bytes);
  py::class_<ops::StepPlan>(module, "StepPlan")
      .def(py::init<>())
      .def("input", &ops::StepPlan::input, py::arg("width"))
      .def("linear", &add_linear, py::arg("x"), py::arg("parts"), py::arg("residual") = py::none())
      .def("rms_norm", &add_rms_norm, py::arg("x"), py::arg("heads"), py::arg("weight"),
           py::arg("eps"))
      .def("rms_norm_outputs", &add_rms_norm_outputs, py::arg("x"), py::arg("weight"),
           py::arg("eps"))
      .def("rotate", &add_rotate, py::arg("x"), py::arg("heads"), py::arg("cos"), py::arg("sin"))
      .def("gated", &add_gated, py::arg("x"), py::arg("parts"))
      .def("append_kv", &add_append_kv, py::arg("layer"), py::arg("kv_heads"), py::arg("keys"),
           py::arg("values"))
      .def("attend", &add_attend, py::arg("layer"), py::arg("heads"), py::arg("queries"),
           py::arg("scale"))
      .def("need_stages", &ops::StepPlan::need_stages, py::arg("stages"))
      .def("finish", &ops::StepPlan::finish, py::arg("result"))
      .def_property_readonly("operators", &ops::StepPlan::operators)
      .def_property_readonly(
          "row_bytes", [](const ops::StepPlan& plan) { return plan.row_floats() * sizeof(float); })
      .def("stages_of", &ops::StepPlan::stages_of, py::arg("operator"))
      .def("run", &run_plan, py::arg("pool"), py::arg("workspace"), py::arg("kv"), py::arg("given"),
           py::arg("progress"));
}

}  // namespace aegaeon

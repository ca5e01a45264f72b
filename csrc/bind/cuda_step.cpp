#include "bind/cuda_step.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/attention.h"
#include "bind/operands.h"
#include "cuda/device.h"
#include "cuda/exchange.h"
#include "cuda/graph.h"
#include "ops/cuda/step_plan.h"
#include "ops/cuda/step_upload.h"

namespace py = pybind11;

namespace aegaeon {
namespace {

using cuda::Device;
using cuda::Exchange;
using ops::View;
using ops::cuda::StepPlan;

using Columns = std::array<std::size_t, 3>;  // slot, first column, columns
using Shared = py::call_guard<py::gil_scoped_release>;

View columns_of(const Columns& columns) { return {columns[0], columns[1], columns[2]}; }

// As device/packed.py gives them: address, outputs, type code, bias.
std::vector<ops::cuda::Part> parts_of(const py::tuple& given) {
  constexpr int kBf16Products = 4;
  std::vector<ops::cuda::Part> parts;
  for (const py::handle part : given) {
    const auto [weights, outputs, code, bias] =
        part.cast<std::tuple<Address, std::size_t, int, Address>>();
    const auto type =
        code == kBf16Products ? ops::WeightType::bf16 : static_cast<ops::WeightType>(code);
    parts.push_back({pointer<const void>(weights), outputs, type, pointer<const float>(bias)});
  }
  return parts;
}

// Records until `finish`, and is a plan from then on.
class CudaStepPlan {
 public:
  ops::cuda::StepRecord& record() {
    ops::require(!plan_, "a plan that is finished takes no more operators");
    return record_;
  }
  void finish(ops::Slot result) {
    plan_.emplace(record(), result);
    identity_ = ops::cuda::identity_of(record_);
  }
  const StepPlan& plan() const {
    ops::require(plan_.has_value(), "a plan is finished before it runs");
    return *plan_;
  }
  py::bytes identity() const { return identity_; }
  std::optional<std::size_t> product_of(std::size_t at) const {
    const ops::cuda::Launch& launch = plan().launch(at);
    return launch.run ? std::nullopt : std::make_optional(launch.product);
  }
  py::list products() const;

 private:
  ops::cuda::StepRecord record_;
  std::optional<StepPlan> plan_;
  std::string identity_;
};

// Of each product its factors: where x begins (bytes of a row before it), its type and columns;
// whether the product goes to the result, else where it begins, how wide it is; column, outputs.
py::list CudaStepPlan::products() const {
  const auto begin_of = [this](ops::Slot slot) { return plan().place(slot).begin * sizeof(float); };
  py::list products;
  for (const ops::cuda::Product& product : plan().products()) {
    py::list factors;
    for (const ops::cuda::Factor& factor : product) {
      const ops::cuda::Place& x = plan().place(factor.x);
      const ops::cuda::Place& out = plan().place(factor.out);
      factors.append(py::make_tuple(
          py::make_tuple(begin_of(factor.x), static_cast<int>(x.type), x.width),
          py::make_tuple(out.home == ops::cuda::Home::result, begin_of(factor.out), out.width),
          py::make_tuple(factor.column, factor.part.outputs), x.is_of_outputs));
    }
    products.append(factors);
  }
  return products;
}

// Rows, the addresses of ids, cosines and sines; outputs, and the address of their rows.
using StepGiven = std::tuple<std::size_t, std::array<Address, 3>, std::size_t, Address>;
// Address, vocabulary, type code, and bytes where it lies in the host, else 0.
using StepTable = std::tuple<Address, std::size_t, int, std::size_t>;

ops::cuda::HostStep host_step(const StepGiven& given, const StepTable& table) {
  const auto& [rows, addresses, outputs, chosen] = given;
  const auto& [tiles, vocab, type, bytes] = table;
  const auto* const output_rows = pointer<const std::int64_t>(chosen);
  for (std::size_t at = 0; at < outputs; ++at) {
    if (output_rows[at] < 0 || static_cast<std::size_t>(output_rows[at]) >= rows) {
      throw std::out_of_range("row " + std::to_string(output_rows[at]) + " of " +
                              std::to_string(rows));
    }
  }
  return {rows,
          pointer<const std::int64_t>(addresses[0]),
          pointer<const float>(addresses[1]),
          pointer<const float>(addresses[2]),
          outputs,
          output_rows,
          {pointer<const void>(tiles), vocab, static_cast<ops::WeightType>(type)},
          bytes};
}

void check_pages(const StepPlan& plan, const PagedRows& rows, std::size_t count) {
  const ops::KvForm& form = plan.kv_form();
  if (form.layers == 0) return;
  rows.check(form.layers - 1, count);
  if (rows.kv.kv_heads != form.kv_heads || rows.kv.head_dim != form.head_dim) {
    throw std::invalid_argument("the plan is for " + std::to_string(form.kv_heads) +
                                " KV heads of " + std::to_string(form.head_dim) +
                                ", the pages are not");
  }
}

// One run of a plan.
class CudaPass {
 public:
  CudaPass(std::shared_ptr<CudaStepPlan> plan, const PagedRows& rows, const StepGiven& given,
           const StepTable& table, const std::array<std::size_t, 3>& bounds)
      : plan_(std::move(plan)),
        rows_(rows),
        upload_((check_pages(plan_->plan(), rows_, std::get<0>(given)), plan_->plan()),
                host_step(given, table), rows_.kv, {bounds[0], bounds[1]}, bounds[2]) {}

  std::size_t upload_bytes() const { return upload_.bytes(); }
  std::size_t workspace_bytes() const { return upload_.workspace_floats() * sizeof(float); }

  // `slots`: where they are, and the rows that each has room for.
  void place(std::pair<Address, std::size_t> slots, Address result, Address upload,
             Address workspace) {
    memory_ = {pointer<std::byte>(slots.first), slots.second, pointer<float>(result)};
    base_ = pointer<std::byte>(upload);
    workspace_ = pointer<float>(workspace);
  }
  void send(Exchange& exchange) const {
    exchange.send(base(), upload_.bytes(), [this](std::byte* to) { upload_.fill(to); });
  }
  py::bytes identity() const { return upload_.identity(memory_, base(), workspace_); }

  std::size_t run(Address stream, std::size_t first, std::size_t stages) const {
    const ops::cuda::StepPass pass{plan_->plan(), memory_, upload_.on_device(base(), workspace_),
                                   pointer<CUstream_st>(stream)};
    return plan_->plan().run(pass, first, stages);
  }

 private:
  std::byte* base() const {
    ops::require(base_ != nullptr, "a pass is placed before it runs");
    return base_;
  }

  const std::shared_ptr<CudaStepPlan> plan_;
  const PagedRows rows_;
  const ops::cuda::StepUpload upload_;
  ops::cuda::StepMemory memory_{};
  std::byte* base_ = nullptr;
  float* workspace_ = nullptr;
};

ops::Slot add_product(CudaStepPlan& plan, const Columns& x, const py::tuple& parts,
                      const std::optional<Columns>& residual) {
  if (!residual) return plan.record().linear(columns_of(x), parts_of(parts), nullptr);
  const View added = columns_of(*residual);
  return plan.record().linear(columns_of(x), parts_of(parts), &added);
}

void bind_recording(py::class_<CudaStepPlan, std::shared_ptr<CudaStepPlan>>& plan) {
  using Plan = CudaStepPlan;
  plan.def("input", [](Plan& self, std::size_t width) { return self.record().input(width); })
      .def("linear", &add_product, py::arg("x"), py::arg("parts"), py::arg("residual") = py::none())
      .def("gated",
           [](Plan& self, const Columns& x, const py::tuple& parts) {
             return self.record().gated(columns_of(x), parts_of(parts));
           })
      .def("rms_norm",
           [](Plan& self, const Columns& x, std::size_t heads, Address weight, float eps) {
             return self.record().rms_norm(columns_of(x), heads, pointer<const float>(weight), eps);
           })
      .def("rms_norm_outputs",
           [](Plan& self, const Columns& x, Address weight, float eps) {
             return self.record().rms_norm_outputs(columns_of(x), pointer<const float>(weight),
                                                   eps);
           })
      .def("rotate",
           [](Plan& self, const Columns& x, std::size_t heads, const Columns& cos,
              const Columns& sin) {
             return self.record().rotate(columns_of(x), heads, columns_of(cos), columns_of(sin));
           })
      .def("append_kv",
           [](Plan& self, std::size_t layer, std::size_t kv_heads, const Columns& keys,
              const Columns& values) {
             self.record().append_kv(layer, kv_heads, columns_of(keys), columns_of(values));
           })
      .def("attend",
           [](Plan& self, std::size_t layer, std::size_t heads, const Columns& queries,
              float scale) {
             return self.record().attend(layer, heads, columns_of(queries), scale);
           })
      .def("need_stages", [](Plan& self, std::size_t stages) { self.record().need_stages(stages); })
      .def("finish", &Plan::finish, py::arg("result"));
}

void bind_plan(py::module_& module) {
  using Plan = CudaStepPlan;
  py::class_<Plan, std::shared_ptr<Plan>> plan(module, "CudaStepPlan", py::module_local());
  plan.def(py::init<>());
  bind_recording(plan);
  plan.def_property_readonly("operators", [](const Plan& self) { return self.plan().launches(); })
      .def_property_readonly("row_bytes", [](const Plan& self) { return self.plan().row_bytes(); })
      .def_property_readonly("identity", &Plan::identity)
      .def_property_readonly("products", &Plan::products)
      .def("stages_of",
           [](const Plan& self, std::size_t at) { return self.plan().launch(at).stages; })
      .def("product_of", &Plan::product_of);
  py::class_<CudaPass>(module, "CudaPass", py::module_local())
      .def(py::init<std::shared_ptr<Plan>, const PagedRows&, const StepGiven&, const StepTable&,
                    const std::array<std::size_t, 3>&>())
      .def_property_readonly("upload_bytes", &CudaPass::upload_bytes)
      .def_property_readonly("workspace_bytes", &CudaPass::workspace_bytes)
      .def_property_readonly("identity", &CudaPass::identity)
      .def("place", &CudaPass::place)
      .def("send", &CudaPass::send, Shared())
      .def("run", &CudaPass::run, Shared());
}

}  // namespace

void bind_cuda_step(py::module_& module) {
  bind_plan(module);
  py::class_<Exchange>(module, "CudaExchange", py::module_local())
      .def(py::init<std::shared_ptr<const Device>, std::size_t>(), py::arg("device"),
           py::arg("size_bytes"), Shared());
  py::class_<cuda::Graph>(module, "CudaGraph", py::module_local())
      .def(
          "launch",
          [](const cuda::Graph& self, Address stream) {
            self.launch(pointer<CUstream_st>(stream));
          },
          Shared());
  using cuda::Recorder;
  py::class_<Recorder>(module, "CudaRecorder", py::module_local())
      .def(py::init<std::shared_ptr<const Device>>(), py::arg("device"), Shared())
      .def_property_readonly(
          "stream", [](const Recorder& self) { return reinterpret_cast<Address>(self.stream()); })
      .def("synchronize", &Recorder::synchronize, Shared())
      .def("begin", &Recorder::begin, Shared())
      .def("end", &Recorder::end, Shared())
      .def("abandon", &Recorder::abandon, Shared());
}

}  // namespace aegaeon

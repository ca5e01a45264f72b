#include "bind/sampling.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/draws.h"
#include "bind/operands.h"
#include "ops/adjustment.h"
#include "ops/cpu/thread_pool.h"
#include "ops/philox.h"
#include "ops/sampling.h"

namespace py = pybind11;

namespace aegaeon {
namespace {

using Best = std::vector<std::pair<std::size_t, double>>;

// Of a row: its adjustment (None: none) and the address of its mask (0: none).
using ChangeTuple = std::pair<const ops::Adjustment*, Address>;

std::vector<ops::RowChange> changes_of(const std::vector<ChangeTuple>& given, std::size_t rows) {
  if (!given.empty() && given.size() != rows) {
    throw std::invalid_argument(std::to_string(given.size()) + " changes are given for " +
                                std::to_string(rows) + " rows of logits");
  }
  std::vector<ops::RowChange> changes;
  changes.reserve(given.size());
  for (const auto& [adjustment, mask] : given) {
    changes.push_back({adjustment, mask == 0 ? nullptr : pointer<const std::uint32_t>(mask)});
  }
  return changes;
}

std::vector<std::optional<std::size_t>> sample(ops::ThreadPool& pool, Address logits,
                                               LogitShape shape,
                                               const std::vector<DrawTuple>& draws,
                                               const std::vector<ChangeTuple>& given) {
  check_logits(shape, draws.size());
  const std::vector<ops::RowChange> changes = changes_of(given, draws.size());
  std::vector<ops::Draw> rows;
  rows.reserve(draws.size());
  for (const DrawTuple& draw : draws) rows.push_back(draw_of(draw));
  std::vector<std::optional<std::size_t>> tokens(draws.size());
  const py::gil_scoped_release released;
  ops::sample(pool, {pointer<const float>(logits), shape.first, shape.second, rows.data(),
                     tokens.data(), changes.empty() ? nullptr : changes.data()});
  return tokens;
}

std::vector<std::optional<std::pair<double, Best>>> log_probabilities(
    ops::ThreadPool& pool, Address logits, LogitShape shape, const std::vector<std::size_t>& chosen,
    std::size_t best) {
  check_logits(shape, chosen.size());
  best = std::min(best, shape.second);
  std::vector<double> chosen_values(shape.first), best_values(shape.first * best);
  std::vector<std::size_t> best_ids(shape.first * best);
  {
    const py::gil_scoped_release released;
    ops::log_probabilities(
        pool, {pointer<const float>(logits), shape.first, shape.second, chosen.data(), best,
               chosen_values.data(), best_ids.data(), best_values.data()});
  }
  std::vector<std::optional<std::pair<double, Best>>> rows(shape.first);
  for (std::size_t row = 0; row < shape.first; ++row) {
    if (std::isnan(chosen_values[row])) continue;
    rows[row].emplace(chosen_values[row], Best{});
    for (std::size_t at = row * best; at < (row + 1) * best; ++at) {
      rows[row]->second.emplace_back(best_ids[at], best_values[at]);
    }
  }
  return rows;
}

}  // namespace

void bind_sampling(py::module_& module) {
  module.def("uniform", &ops::uniform, py::arg("seed"), py::arg("position"));
  py::class_<ops::Adjustment>(module, "Adjustment", py::module_local())
      .def(
          py::init([](std::tuple<double, double, double> penalties,
                      const ops::Adjustment::Bias& bias, const std::vector<std::uint32_t>& prompt) {
            const auto& [repetition, presence, frequency] = penalties;
            return ops::Adjustment({repetition, presence, frequency}, bias, prompt);
          }),
          py::arg("penalties"), py::arg("bias"), py::arg("prompt"))
      .def("count", &ops::Adjustment::count, py::arg("token"));
  module.def("sample", &sample, py::arg("pool"), py::arg("logits"), py::arg("shape"),
             py::arg("draws"), py::arg("changes") = std::vector<ChangeTuple>{});
  module.def("log_probabilities", &log_probabilities, py::arg("pool"), py::arg("logits"),
             py::arg("shape"), py::arg("chosen"), py::arg("best"));
}

}  // namespace aegaeon

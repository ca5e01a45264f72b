#include "bind/sampling.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "bind/draws.h"
#include "bind/operands.h"
#include "ops/cpu/thread_pool.h"
#include "ops/philox.h"
#include "ops/sampling.h"

namespace py = pybind11;

namespace aegaeon {
namespace {

using Best = std::vector<std::pair<std::size_t, double>>;

std::vector<std::optional<std::size_t>> sample(ops::ThreadPool& pool, Address logits,
                                               LogitShape shape,
                                               const std::vector<DrawTuple>& draws) {
  check_logits(shape, draws.size());
  std::vector<ops::Draw> rows;
  rows.reserve(draws.size());
  for (const DrawTuple& draw : draws) rows.push_back(draw_of(draw));
  std::vector<std::optional<std::size_t>> tokens(draws.size());
  const py::gil_scoped_release released;
  ops::sample(
      pool, {pointer<const float>(logits), shape.first, shape.second, rows.data(), tokens.data()});
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
  module.def("sample", &sample, py::arg("pool"), py::arg("logits"), py::arg("shape"),
             py::arg("draws"));
  module.def("log_probabilities", &log_probabilities, py::arg("pool"), py::arg("logits"),
             py::arg("shape"), py::arg("chosen"), py::arg("best"));
}

}  // namespace aegaeon

#include "bind/attention.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/operands.h"
#include "ops/cpu/thread_pool.h"
#include "ops/ops.h"

namespace py = pybind11;

namespace aegaeon {
namespace {

using Sequence = std::tuple<std::size_t, std::size_t, std::size_t, py::tuple>;

// Block tables grow with the context and are read in each pass: a plain conversion for each id.
std::vector<std::size_t> blocks_of(const py::tuple& ids) {
  std::vector<std::size_t> blocks(ids.size());
  for (std::size_t at = 0; at < blocks.size(); ++at) {
    blocks[at] = PyLong_AsSize_t(PyTuple_GET_ITEM(ids.ptr(), static_cast<Py_ssize_t>(at)));
    if (blocks[at] == std::numeric_limits<std::size_t>::max() && PyErr_Occurred() != nullptr) {
      throw py::error_already_set();
    }
  }
  return blocks;
}

std::unique_ptr<PagedRows> make_rows(std::tuple<Address, std::size_t, int> pages,
                                     std::array<std::size_t, 3> shape,
                                     const std::vector<Sequence>& sequences) {
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) {
    throw std::invalid_argument("layers, KV heads and head_dim must be at least 1");
  }
  constexpr std::size_t kMost = std::numeric_limits<std::uint32_t>::max();
  const auto [address, page_count, type] = pages;
  if (type < 0 || type > static_cast<int>(ops::KvType::f16)) {
    throw std::invalid_argument("type " + std::to_string(type) + " of the KV is none of 0, 1, 2");
  }
  auto made = std::make_unique<PagedRows>();
  made->layers = shape[0];
  made->kv.pages = pointer<void>(address);
  made->kv.type = static_cast<ops::KvType>(type);
  made->kv.kv_heads = shape[1];
  made->kv.head_dim = shape[2];
  const std::size_t block_pages = shape[0] * 2 * shape[1];
  for (const auto& [first_row, rows, start, ids] : sequences) {
    std::vector<std::size_t> blocks = blocks_of(ids);
    if (std::max({first_row, rows, start}) > kMost) {
      throw std::invalid_argument("rows and positions must be less than 2^32");
    }
    made->rows = std::max(made->rows, first_row + rows);
    if (blocks.size() * ops::kBlockTokens < start + rows) {
      throw std::invalid_argument(std::to_string(blocks.size()) + " blocks do not hold " +
                                  std::to_string(start + rows) + " tokens; allocate more");
    }
    for (const std::size_t block : blocks) {
      if (block > page_count || page_count - block < block_pages) {
        throw std::invalid_argument("block " + std::to_string(block) + " lies outside the arena");
      }
    }
    made->kv.sequences.push_back({first_row, rows, start, std::move(blocks)});
  }
  return made;
}

void append_kv(ops::ThreadPool& pool, const PagedRows& rows, std::size_t layer, std::size_t count,
               Strided keys, Strided values) {
  rows.check(layer, count);
  const ops::PagedKv& kv = rows.on_cpu();
  const py::gil_scoped_release released;
  ops::append_kv(pool, {kv, layer, rows_of(keys), rows_of(values)});
}

void attend(ops::ThreadPool& pool, const PagedRows& rows, std::size_t layer,
            std::tuple<Address, std::size_t, std::size_t> queries, float scale, Address out) {
  const auto [first, count, heads] = queries;
  rows.check(layer, count);
  const ops::PagedKv& kv = rows.on_cpu();
  if (heads == 0 || heads % rows.kv.kv_heads != 0) {
    throw std::invalid_argument(std::to_string(heads) + " heads share " +
                                std::to_string(rows.kv.kv_heads) + " KV heads unevenly");
  }
  const py::gil_scoped_release released;
  ops::attend(pool, {kv, layer, heads, pointer<const float>(first), scale, pointer<float>(out)});
}

}  // namespace

void bind_attention(py::module_& module) {
  py::class_<PagedRows>(module, "PagedRows")
      .def(py::init(&make_rows), py::arg("pages"), py::arg("shape"), py::arg("sequences"));
  module.def("append_kv", &append_kv, py::arg("pool"), py::arg("rows"), py::arg("layer"),
             py::arg("count"), py::arg("keys"), py::arg("values"));
  module.def("attend", &attend, py::arg("pool"), py::arg("rows"), py::arg("layer"),
             py::arg("queries"), py::arg("scale"), py::arg("out"));
}

}  // namespace aegaeon

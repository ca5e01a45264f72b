#include "memory/quantize.h"

#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "bind/operands.h"
#include "bind/quantize.h"

namespace py = pybind11;

namespace aegaeon {
namespace {

void quantize_tiles(Address source, std::pair<std::size_t, std::size_t> shape,
                    std::uint32_t convert, Address out) {
  if (convert >= memory::kConvertCount) {
    throw std::invalid_argument("unknown conversion " + std::to_string(convert));
  }
  if (out % 64 != 0) throw std::invalid_argument("tiles must be 64-byte aligned");
  const py::gil_scoped_release released;
  const bool is_finite = memory::quantize_tiles(
      pointer<const std::byte>(source), pointer<std::byte>(out), shape.first, shape.second,
      static_cast<memory::Convert>(convert), memory::Fate::copied);
  if (!is_finite) throw std::invalid_argument("int8 holds neither infinity nor NaN");
}

}  // namespace

void bind_quantize(py::module_& module) {
  module.def("quantize_tiles", &quantize_tiles, py::arg("source"), py::arg("shape"),
             py::arg("convert"), py::arg("out"));
}

}  // namespace aegaeon

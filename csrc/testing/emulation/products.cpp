#include "testing/emulation/products.h"

#include <cstdint>
#include <vector>

#include "testing/emulation/half.h"

namespace aegaeon::emulation {
namespace {

// Sums side by side, so that a compiler may use vectors.
constexpr std::size_t kLanes = 16;

float widened(const void* from, std::size_t at, FactorType type) {
  switch (type) {
    case FactorType::f32:
      return static_cast<const float*>(from)[at];
    case FactorType::bf16:
      return widen_bf16(static_cast<const std::uint16_t*>(from)[at]);
    case FactorType::f16:
      break;
  }
  return widen_f16(static_cast<const std::uint16_t*>(from)[at]);
}

// Rows of whole lanes, zeros behind the inputs.
std::vector<float> widen_rows(const void* from, std::size_t rows, std::size_t inputs,
                              FactorType type) {
  const std::size_t width = (inputs + kLanes - 1) / kLanes * kLanes;
  std::vector<float> wide(rows * width);
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t k = 0; k < inputs; ++k) {
      wide[row * width + k] = widened(from, row * inputs + k, type);
    }
  }
  return wide;
}

float dot(const float* one, const float* other, std::size_t width) {
  float sums[kLanes] = {};
  for (std::size_t k = 0; k < width; k += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      sums[lane] += one[k + lane] * other[k + lane];
    }
  }
  float sum = 0;
  for (const float part : sums) sum += part;
  return sum;
}

}  // namespace

void multiply(const MultiplyParams& params) {
  const std::size_t width = (params.inputs + kLanes - 1) / kLanes * kLanes;
  const std::vector<float> x = widen_rows(params.x, params.rows, params.inputs, params.type);
  const std::size_t element_bytes = params.type == FactorType::f32 ? 4 : 2;
  for (std::size_t output = 0; output < params.outputs; ++output) {
    const auto* const at =
        static_cast<const std::byte*>(params.weights) + output * params.inputs * element_bytes;
    const std::vector<float> weights = widen_rows(at, 1, params.inputs, params.type);
    for (std::size_t row = 0; row < params.rows; ++row) {
      params.out[row * params.out_stride + output] =
          dot(x.data() + row * width, weights.data(), width);
    }
  }
}

}  // namespace aegaeon::emulation

// Products as a vendor's library makes them on a device: factors of 16 or 32 bits, sums in float32.
#pragma once

#include <cstddef>

namespace aegaeon::emulation {

enum class FactorType : int { f32 = 0, bf16 = 1, f16 = 2 };

struct MultiplyParams {
  const void* x;  // [rows, inputs]
  std::size_t rows;
  std::size_t inputs;
  const void* weights;  // [outputs, inputs]
  std::size_t outputs;
  FactorType type;         // of both
  float* out;              // [rows, outputs]
  std::size_t out_stride;  // from row to row
};

// A row's sums are made in one order, whatever the others are.
void multiply(const MultiplyParams& params);

}  // namespace aegaeon::emulation

// One weight to float32, exactly; NaNs stay NaNs.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops/ops.h"

namespace aegaeon::ops {

inline float float_of_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen_bf16(std::uint16_t bits) {
  return float_of_bits(static_cast<std::uint32_t>(bits) << 16);
}

inline float widen_f16(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000U) << 16;
  const std::uint32_t magnitude = bits & 0x7FFFU;
  if (magnitude >= 0x7C00U) {  // infinity or NaN: the largest exponent
    const std::uint32_t quiet = magnitude > 0x7C00U ? 0x400000U : 0U;
    return float_of_bits(sign | 0x7F800000U | quiet | (magnitude & 0x3FFU) << 13);
  }
  // 2^112 is what the two exponents' biases differ by; it makes subnormals normal as well.
  const float value = float_of_bits(magnitude << 13) * 0x1p112F;
  std::uint32_t positive;
  std::memcpy(&positive, &value, sizeof positive);
  return float_of_bits(sign | positive);
}

template <WeightType type>
float widen_at(const void* elements, std::size_t index) {
  if constexpr (type == WeightType::f32) {
    return static_cast<const float*>(elements)[index];
  } else {
    const std::uint16_t bits = static_cast<const std::uint16_t*>(elements)[index];
    return type == WeightType::bf16 ? widen_bf16(bits) : widen_f16(bits);
  }
}

inline std::size_t element_bytes(WeightType type) { return type == WeightType::f32 ? 4 : 2; }

}  // namespace aegaeon::ops

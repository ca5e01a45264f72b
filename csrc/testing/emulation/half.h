// The half types in software, rounded half to even, subnormals and all.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace aegaeon::emulation {

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen_bf16(std::uint16_t half) { return float_of(std::uint32_t{half} << 16); }

inline std::uint16_t narrow_bf16(float value) {
  const std::uint32_t bits = bits_of(value);
  if (std::isnan(value)) return 0x7FFF;
  return static_cast<std::uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16);
}

inline float widen_f16(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000U) << 16, magnitude = half & 0x7FFFU;
  if (magnitude >= 0x7C00U) return float_of(sign | 0x7F800000U | (magnitude & 0x3FFU) << 13);
  // 2^112 times too small as a float, subnormals too: exact to scale.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112F));
}

inline std::uint16_t narrow_f16(float value) {
  const auto sign = static_cast<std::uint16_t>(bits_of(value) >> 16 & 0x8000U);
  if (std::isnan(value)) return 0x7FFF;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0F) return static_cast<std::uint16_t>(sign | 0x7C00U);
  // Steps of the result: 2^-24 below 2^-14, and 2^-10 of the power of two above.
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int step = (exponent < -13 ? -13 : exponent) - 11;
  const float steps = std::nearbyint(std::ldexp(magnitude, -step));
  const float rounded = std::ldexp(steps, step);
  return static_cast<std::uint16_t>(sign | bits_of(rounded * 0x1p-112F) >> 13);
}

}  // namespace aegaeon::emulation

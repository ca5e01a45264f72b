// One weight to float32, exactly; NaNs stay NaNs. And what tiles of weights take.
#pragma once

#include <cstddef>
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

// Weight [output][k] of a tile of floats.
template <WeightType type>
float weight_at(const void* tile, std::size_t output, std::size_t k) {
  constexpr std::size_t inputs = type == WeightType::bf16 ? 2 : 1;
  return widen_at<type>(tile, (k / inputs * kTileOutputs + output) * inputs + k % inputs);
}

constexpr std::size_t kGroupLineBytes = 2 * kTileOutputs;
constexpr std::size_t kGroupBytes = (1 + kGroupInputs / 2) * kGroupLineBytes;

// Weight [output][k] of a tile of type i8.
inline float dequantized(const void* tile, std::size_t output, std::size_t k) {
  const char* const group = static_cast<const char*>(tile) + k / kGroupInputs * kGroupBytes;
  std::uint16_t scale;
  std::memcpy(&scale, group + output * sizeof scale, sizeof scale);
  const std::size_t line = 1 + k % kGroupInputs / 2;
  std::int8_t weight;
  std::memcpy(&weight, group + line * kGroupLineBytes + 2 * output + k % 2, 1);
  return static_cast<float>(weight) * widen_bf16(scale);
}

// What a tile is made of, one behind the other: lines of floats, or groups of int8. The last group
// of a tile may be shorter.
struct Step {
  std::size_t inputs;
  std::size_t bytes;  // of the tile
};

constexpr Step step_of(WeightType type) {
  switch (type) {
    case WeightType::f32:
      return {1, 4 * kTileOutputs};
    case WeightType::bf16:
      return {2, 4 * kTileOutputs};
    case WeightType::f16:
      return {1, 2 * kTileOutputs};
    default:
      return {kGroupInputs, kGroupBytes};
  }
}

// Lines of `inputs` inputs in whole groups, scales included.
constexpr std::size_t group_lines(std::size_t inputs) {
  return (inputs + kGroupInputs - 1) / kGroupInputs + (inputs + 1) / 2;
}

constexpr std::size_t tile_bytes(WeightType type, std::size_t inputs) {
  return type == WeightType::i8 ? group_lines(inputs) * kGroupLineBytes
                                : inputs / step_of(type).inputs * step_of(type).bytes;
}

}  // namespace aegaeon::ops

// float32 to the types that keys and values are stored in.
#pragma once

#include <cstdint>
#include <cstring>

namespace aegaeon::ops {

// Static: files for other processors have copies of their own. Rounds half to even; what is too
// large becomes infinity, NaNs stay NaNs.
static inline std::uint16_t narrow_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFFU) > 0x7F800000U;
  return static_cast<std::uint16_t>(is_nan ? bits >> 16 | 0x40U : rounded);
}

}  // namespace aegaeon::ops

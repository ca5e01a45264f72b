// exp in plain float32 operations, so that vector loops and their tails give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace aegaeon::ops {

// Within 2 ulp; 0 below -104, infinity above 89, NaN for NaN. Cody and Waite's reduction and the
// polynomial of Cephes' expf. Static: files for other processors have copies of their own.
static inline float exp_float(float x) {
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: what is added is rounded to an integer
  const float low = x < -104.0F ? -104.0F : x;
  const float clamped = low > 89.0F ? 89.0F : low;
  const float shifted = clamped * 1.44269504F + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693359375F) + n * 2.12194440e-4F;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = (p * r) * r + r + 1.0F;
  // 2^n in two factors, either of which is a normal number.
  std::int32_t power, rounding;
  std::memcpy(&power, &shifted, sizeof power);
  std::memcpy(&rounding, &kRound, sizeof rounding);
  const std::uint32_t exponent =
      static_cast<std::uint32_t>(power) - static_cast<std::uint32_t>(rounding);
  const std::uint32_t half = static_cast<std::uint32_t>(static_cast<std::int32_t>(exponent) >> 1);
  const std::uint32_t first_bits = (half + 127U) << 23;
  const std::uint32_t second_bits = (exponent - half + 127U) << 23;
  float first, second;
  std::memcpy(&first, &first_bits, sizeof first);
  std::memcpy(&second, &second_bits, sizeof second);
  return p * first * second;
}

}  // namespace aegaeon::ops

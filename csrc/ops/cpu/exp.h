// exp in float32 operations that are the same in vector loops and their tails, so are the bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace aegaeon::ops {

struct RoundedApart {
  static float multiply_add_one(float a, float b, float sum) { return sum + a * b; }
};

// Within 2 ulp; 0 below -104, infinity above 89, NaN for NaN. Cody and Waite's reduction and the
// polynomial of Cephes' expf, with Math::multiply_add_one(a, b, sum). Static: files for other
// processors have copies of their own.
template <typename Math>
static inline float exp_of(float x) {
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: what is added is rounded to an integer
  const float low = x < -104.0F ? -104.0F : x;
  const float clamped = low > 89.0F ? 89.0F : low;
  const float shifted = Math::multiply_add_one(clamped, 1.44269504F, kRound);
  const float n = shifted - kRound;
  const float most = Math::multiply_add_one(n, -0.693359375F, clamped);
  const float r = Math::multiply_add_one(n, 2.12194440e-4F, most);
  float p = 1.9875691500e-4F;
  p = Math::multiply_add_one(p, r, 1.3981999507e-3F);
  p = Math::multiply_add_one(p, r, 8.3334519073e-3F);
  p = Math::multiply_add_one(p, r, 4.1665795894e-2F);
  p = Math::multiply_add_one(p, r, 1.6666665459e-1F);
  p = Math::multiply_add_one(p, r, 5.0000001201e-1F);
  p = Math::multiply_add_one(p * r, r, r) + 1.0F;
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

static inline float exp_float(float x) { return exp_of<RoundedApart>(x); }

}  // namespace aegaeon::ops

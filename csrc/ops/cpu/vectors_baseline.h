// Vectors of floats in the compiler's own words, which it has instructions for on any processor.
// Products and sums are rounded apart.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "ops/cpu/unroll.h"
#include "ops/cpu/widen.h"

namespace aegaeon::ops {
namespace {

struct PlainVectors {
  static constexpr std::size_t kWidth = 8;
  static constexpr std::size_t kSums = 2;
  // Of 16 bytes, as wide as registers are everywhere.
  typedef float Floats4 __attribute__((vector_size(16)));
  typedef std::uint32_t Words4 __attribute__((vector_size(16)));
  static constexpr std::size_t kParts = kWidth / 4;
  struct Vector {
    Floats4 parts[kParts];
  };

  static Vector zero() { return Vector{}; }

  static Vector load(const float* from) {
    Vector vector;
    unroll<kParts>([&](auto i) { std::memcpy(&vector.parts[i.at], from + 4 * i.at, 16); });
    return vector;
  }

  static void store(float* to, const Vector& vector) {
    unroll<kParts>([&](auto i) { std::memcpy(to + 4 * i.at, &vector.parts[i.at], 16); });
  }

  static Vector broadcast(const float* from) {
    const Floats4 all = {*from, *from, *from, *from};
    return {{all, all}};
  }

  static float multiply_add_one(float a, float b, float sum) { return sum + a * b; }

  static Vector multiply_add(const Vector& a, const Vector& b, Vector sum) {
    unroll<kParts>([&](auto i) { sum.parts[i.at] += a.parts[i.at] * b.parts[i.at]; });
    return sum;
  }

  // The even elements, low in memory, and the odd ones.
  static void load_bf16(const char* from, Vector& even, Vector& odd) {
    unroll<kParts>([&](auto i) {
      Words4 both;
      std::memcpy(&both, from + 16 * i.at, 16);
      even.parts[i.at] = reinterpret_cast<Floats4>(both << 16);
      odd.parts[i.at] = reinterpret_cast<Floats4>(both & 0xFFFF0000U);
    });
  }

  static Vector load_f16(const char* from) {
    Vector vector;
    unroll<kParts>([&](auto i) { vector.parts[i.at] = widen_f16(from + 8 * i.at); });
    return vector;
  }

  // Puts even and odd elements in order.
  static void interleave(Vector& low, Vector& high) {
    float even[kWidth], odd[kWidth], both[2 * kWidth];
    store(even, low);
    store(odd, high);
    for (std::size_t i = 0; i < kWidth; ++i) {
      both[2 * i] = even[i];
      both[2 * i + 1] = odd[i];
    }
    low = load(both);
    high = load(both + kWidth);
  }

 private:
  // The formula of widen.h.
  static Floats4 widen_f16(const char* from) {
    typedef std::uint16_t Halves4 __attribute__((vector_size(8)));
    Halves4 halves;
    std::memcpy(&halves, from, sizeof halves);
    const Words4 bits = __builtin_convertvector(halves, Words4);
    const Words4 magnitude = bits & 0x7FFFU;
    const Floats4 value = reinterpret_cast<Floats4>(magnitude << 13) * 0x1p112F;
    // A comparison's result is all ones where it holds.
    const Words4 infinite = reinterpret_cast<Words4>(magnitude >= 0x7C00U) & 0x7F800000U;
    const Words4 quiet = reinterpret_cast<Words4>(magnitude > 0x7C00U) & 0x400000U;
    const Words4 sign = (bits & 0x8000U) << 16;
    return reinterpret_cast<Floats4>(sign | reinterpret_cast<Words4>(value) | infinite | quiet);
  }
};

}  // namespace
}  // namespace aegaeon::ops

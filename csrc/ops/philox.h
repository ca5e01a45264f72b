// Random numbers by key and counter: Philox4x64-10 (Salmon et al. 2011), in the stream of numpy.
#pragma once

#include <array>
#include <cstdint>

namespace aegaeon::ops {

struct WideProduct {
  std::uint64_t high, low;
};

// By halves of 32 bits: not every compiler has integers of 128.
inline WideProduct multiply_wide(std::uint64_t a, std::uint64_t b) {
  constexpr std::uint64_t kLow = 0xFFFFFFFFU;
  const std::uint64_t low = (a & kLow) * (b & kLow);
  const std::uint64_t first = (a >> 32) * (b & kLow) + (low >> 32);
  const std::uint64_t second = (a & kLow) * (b >> 32) + (first & kLow);
  return {(a >> 32) * (b >> 32) + (first >> 32) + (second >> 32), a * b};
}

// A number in [0, 1), a multiple of 2^-53, that belongs to (seed, position): what
// numpy.random.Generator(numpy.random.Philox(key=[seed, position])).random() returns first.
inline double uniform(std::uint64_t seed, std::uint64_t position) {
  // numpy counts before it draws.
  std::array<std::uint64_t, 4> block{1, 0, 0, 0};
  for (int round = 0; round < 10; ++round) {
    const WideProduct even = multiply_wide(0xD2E7470EE14C6C93U, block[0]);
    const WideProduct odd = multiply_wide(0xCA5A826395121157U, block[2]);
    block = {odd.high ^ block[1] ^ seed, odd.low, even.high ^ block[3] ^ position, even.low};
    seed += 0x9E3779B97F4A7C15U;
    position += 0xBB67AE8584CAA73BU;
  }
  return static_cast<double>(block[0] >> 11) * 0x1p-53;
}

}  // namespace aegaeon::ops

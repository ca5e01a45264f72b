// Not to be compiled under a sanitizer: see block.cpp.

#include "testing/emulation/warp.h"

#include <cstring>

#include "testing/emulation/half.h"

namespace aegaeon::emulation {
namespace {

float widen(std::uint32_t word, unsigned half, bool is_bf16) {
  const auto bits = static_cast<std::uint16_t>(word >> (16 * half));
  return is_bf16 ? widen_bf16(bits) : widen_f16(bits);
}

// The words `first` .. of a lane, two halves each, as floats: those that go with inputs k, k + 1.
void take(const std::uint32_t (&words)[kGivenWords], unsigned first, float* out) {
  out[0] = float_of(words[first]);
  out[1] = float_of(words[first + 1]);
}

}  // namespace

void multiply_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                      bool is_bf16) {
  const std::uint32_t halves[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  std::uint32_t own[12];
  for (unsigned at = 0; at < 12; ++at) own[at] = bits_of(widen(halves[at / 2], at % 2, is_bf16));
  const Given given = meet(Meeting::multiply, own, 12);
  const unsigned lane = lane_index(), group = lane / 4, pair = lane % 4;
  float rows[2][16], columns[2][16];
  for (unsigned from = 0; from < 4; ++from) {
    for (unsigned i = 0; i < 2; ++i) {
      for (unsigned half = 0; half < 2; ++half) {  // inputs 2 * from .. and 8 more
        const unsigned k = 2 * from + 8 * half;
        take(given[4 * group + from], 2 * i + 4 * half, &rows[i][k]);
        take(given[4 * (2 * pair + i) + from], 8 + 2 * half, &columns[i][k]);
      }
    }
  }
  for (unsigned i = 0; i < 4; ++i) {
    double sum = static_cast<double>(d[i]);
    for (unsigned k = 0; k < 16; ++k) {
      sum += static_cast<double>(rows[i / 2][k]) * static_cast<double>(columns[i % 2][k]);
    }
    d[i] = static_cast<float>(sum);
  }
}

void distribute_matrices(std::uint32_t (&out)[4], const std::uint32_t (&row)[4],
                         bool is_transposed) {
  const Given given = meet(Meeting::matrices, row, 4);
  const unsigned lane = lane_index(), group = lane / 4, pair = lane % 4;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    if (!is_transposed) {
      out[matrix] = given[8 * matrix + group][pair];
      continue;
    }
    const unsigned low = given[8 * matrix + 2 * pair][group / 2] >> (16 * (group % 2));
    const unsigned high = given[8 * matrix + 2 * pair + 1][group / 2] >> (16 * (group % 2));
    out[matrix] = (low & 0xFFFFU) | high << 16;
  }
}

}  // namespace aegaeon::emulation

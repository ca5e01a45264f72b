// Loops over a few dozen floats of one row, in plain operations, so that they give the same bits
// wherever they are compiled. Static: files for other processors have copies of their own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "ops/cpu/exp.h"
#include "ops/cpu/narrow.h"
#include "ops/ops.h"

namespace aegaeon::ops {

// Of one instruction set.
struct RowKernels {
  // Rounds a group of x to 16 bits, zero beyond `count`, and returns its scale: see LinearParams.
  float (*quantize)(const float* x, std::size_t count, std::int16_t* out);
  // Rounds x to bf16, `count` of them: the bits of a float each, or of two in a word.
  void (*round)(const float* x, std::size_t count, std::uint32_t* out);
  void (*round_pairs)(const float* x, std::size_t count, std::uint32_t* out);
  // gate = gate / (1 + exp(-gate)) * up, 32 each.
  void (*gate)(float* gate, const float* up);
};

RowKernels baseline_rows();
RowKernels avx2_rows();
RowKernels avx512_rows();

static inline float quantize_group(const float* x, std::size_t count, std::int16_t* out) {
  float padded[kGroupInputs];
  if (count < kGroupInputs) {
    std::memset(padded, 0, sizeof padded);
    std::memcpy(padded, x, count * sizeof(float));
    x = padded;
  }
  // Of floats without their sign the bits have the same order, NaNs last.
  std::int32_t largest_bits = 0;
  for (std::size_t i = 0; i < kGroupInputs; ++i) {
    std::int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7FFFFFFF;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  float largest;
  std::memcpy(&largest, &largest_bits, sizeof largest);
  if (largest_bits >= 0x7F800000) {
    std::memset(out, 0, kGroupInputs * sizeof *out);
    return largest - largest;  // NaN
  }
  constexpr float kLeast = 0x1p-126F;  // its inverse is a float
  const float exact = largest / 32767.0F;
  const float scale = exact < kLeast ? kLeast : exact;
  const float inverse = 1.0F / scale;
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: what is added is rounded to an integer
  for (std::size_t i = 0; i < kGroupInputs; ++i) {
    const float shifted = x[i] * inverse + kRound;
    std::uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    out[i] = static_cast<std::int16_t>(static_cast<std::uint16_t>(bits));
  }
  return scale;
}

static inline void round_row(const float* x, std::size_t count, std::uint32_t* out) {
  for (std::size_t i = 0; i < count; ++i) out[i] = std::uint32_t{narrow_bf16(x[i])} << 16;
}

static inline void round_row_pairs(const float* x, std::size_t count, std::uint32_t* out) {
  for (std::size_t i = 0; i < count / 2; ++i) {
    out[i] = narrow_bf16(x[2 * i]) | std::uint32_t{narrow_bf16(x[2 * i + 1])} << 16;
  }
}

static inline void gate_tile(float* gate, const float* up) {
  for (std::size_t i = 0; i < kTileOutputs; ++i) {
    gate[i] = gate[i] / (1.0F + exp_float(-gate[i])) * up[i];
  }
}

static inline RowKernels row_kernels_here() {
  return {quantize_group, round_row, round_row_pairs, gate_tile};
}

}  // namespace aegaeon::ops

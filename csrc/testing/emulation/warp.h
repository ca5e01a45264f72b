// What the lanes of a warp do together, as a device does it, but for how far sums are rounded.
#pragma once

#include <cstdint>

#include "testing/emulation/block.h"

namespace aegaeon::emulation {

// The layouts of the PTX manual, "Matrix fragments for mma.m16n8k16" of bf16 or f16: d += a * b.
void multiply_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                      bool is_bf16);

// ldmatrix.x4: lane i brings row i % 8 of matrix i / 8, 16 bytes, and gets of each matrix the
// elements (i / 4, 2 * (i % 4) ..+ 1), or (2 * (i % 4) ..+ 1, i / 4) of a transposed one.
void distribute_matrices(std::uint32_t (&out)[4], const std::uint32_t (&row)[4],
                         bool is_transposed);

}  // namespace aegaeon::emulation

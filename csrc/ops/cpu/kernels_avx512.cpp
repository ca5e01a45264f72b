// Compiled for AVX-512F (CMakeLists.txt); nothing here may be called without.
#if defined(__x86_64__)

#include "ops/cpu/float_tiles.h"
#include "ops/cpu/linear_panel.h"
#include "ops/cpu/multiply_add.h"
#include "ops/cpu/row_kernels.h"
#include "ops/cpu/sampling_loops.h"
#include "ops/cpu/vectors_avx512.h"

namespace aegaeon::ops {
namespace {

struct Avx512 : FloatTiles<Avx512Vectors> {
  static constexpr std::size_t kMaxRows = 12;
};

}  // namespace

PanelKernel avx512_kernel(WeightType type) { return kernel_of<Avx512>(type); }

RowKernels avx512_rows() { return row_kernels_here(); }

SamplingKernel avx512_sampling() { return sampling_kernel(); }

std::size_t avx512_multiply_adds(std::size_t rounds) { return multiply_adds<Avx512>(rounds); }

}  // namespace aegaeon::ops

#endif

#include "ops/cpu/kernel_choice.h"

#include "ops/cpu/isa.h"

namespace aegaeon::ops {
namespace {

PanelKernel group_kernel() {
#if defined(__x86_64__)
  switch (current_integer_isa()) {
    case IntegerIsa::avx512_vnni:
      return avx512_vnni_group_kernel();
    case IntegerIsa::avx512bw:
      return avx512bw_group_kernel();
    case IntegerIsa::avx2:
      return avx2_kernel(WeightType::i8);
    default:
      break;
  }
#endif
  return baseline_kernel(WeightType::i8);
}

PanelKernel float_kernel(WeightType type) {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::avx512:
      return avx512_kernel(type);
    case Isa::avx2:
      return avx2_kernel(type);
    default:
      break;
  }
#endif
  return baseline_kernel(type);
}

}  // namespace

PanelKernel kernel_for(const Matrix& matrix) {
  if (matrix.type == WeightType::i8) return group_kernel();
  if (matrix.x_type == XType::f32) return float_kernel(matrix.type);
#if defined(__x86_64__)
  if (has_bf16_products()) return avx512_bf16_pair_kernel();
#endif
  PanelKernel kernel = float_kernel(matrix.type);
  kernel.form = XForm::rounded;
  return kernel;
}

RowKernels row_kernels() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::avx512:
      return avx512_rows();
    case Isa::avx2:
      return avx2_rows();
    default:
      break;
  }
#endif
  return baseline_rows();
}

}  // namespace aegaeon::ops

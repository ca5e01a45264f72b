#include "ops/cpu/kernel_choice.h"

#include "ops/cpu/isa.h"
#include "ops/cpu/multiply_add.h"

namespace aegaeon::ops {
namespace {

// Where the kernels on floats of one instruction set are.
struct FloatKernels {
  PanelKernel (*linear)(WeightType type);
  AttentionKernel (*attention)(KvType type);
  RowKernels (*rows)();
  SamplingKernel (*sampling)();
  std::size_t (*multiply_adds)(std::size_t rounds);
};

FloatKernels float_kernels() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::avx512:
      return {avx512_kernel, avx512_attention, avx512_rows, avx512_sampling, avx512_multiply_adds};
    case Isa::avx2:
      return {avx2_kernel, avx2_attention, avx2_rows, avx2_sampling, avx2_multiply_adds};
    default:
      break;
  }
#endif
  return {baseline_kernel, baseline_attention, baseline_rows, baseline_sampling,
          baseline_multiply_adds};
}

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

}  // namespace

PanelKernel kernel_for(const Matrix& matrix) {
  if (matrix.type == WeightType::i8) return group_kernel();
  PanelKernel kernel = float_kernels().linear(matrix.type);
  if (matrix.x_type == XType::f32) return kernel;
#if defined(__x86_64__)
  if (has_bf16_products()) return avx512_bf16_pair_kernel();
#endif
  kernel.form = XForm::rounded;
  return kernel;
}

AttentionKernel attention_for(KvType type) { return float_kernels().attention(type); }

RowKernels row_kernels() { return float_kernels().rows(); }

SamplingKernel sampling_kernels() { return float_kernels().sampling(); }

std::size_t multiply_adds_here(std::size_t rounds) { return float_kernels().multiply_adds(rounds); }

std::size_t multiply_add_pairs_here(std::size_t rounds) {
#if defined(__x86_64__)
  if (has_bf16_products()) return avx512_bf16_multiply_adds(rounds);
#endif
  return multiply_adds_here(rounds);
}

}  // namespace aegaeon::ops

// Which kernels the instruction set in use means: the only place that asks for it.
#pragma once

#include <cstddef>

#include "ops/cpu/attention_split.h"
#include "ops/cpu/linear_panel.h"
#include "ops/cpu/row_kernels.h"
#include "ops/cpu/sampling_kernel.h"
#include "ops/ops.h"

namespace aegaeon::ops {

PanelKernel kernel_for(const Matrix& matrix);
AttentionKernel attention_for(KvType type);
RowKernels row_kernels();
SamplingKernel sampling_kernels();

// Does `rounds` rounds as in multiply_add.h; returns the floating-point operations.
std::size_t multiply_adds_here(std::size_t rounds);
std::size_t multiply_add_pairs_here(std::size_t rounds);

}  // namespace aegaeon::ops

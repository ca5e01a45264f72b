// Which kernels the instruction set in use means.
#pragma once

#include "ops/cpu/linear_panel.h"
#include "ops/cpu/row_kernels.h"
#include "ops/ops.h"

namespace aegaeon::ops {

PanelKernel kernel_for(const Matrix& matrix);
RowKernels row_kernels();

}  // namespace aegaeon::ops

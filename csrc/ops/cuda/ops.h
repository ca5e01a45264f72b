// The operators on a CUDA device, by the names and params of ops/ops.h: pointers are the device's,
// and what is asked for happens on a stream, after what was asked before. Nothing is allocated.
// Products are not here: torch has the vendor's.
#pragma once

#include "ops/cuda/tables.h"
#include "ops/ops.h"

struct CUstream_st;

namespace aegaeon::ops::cuda {

using Stream = CUstream_st*;  // the runtime's cudaStream_t

// `params.kv` is what `tables` were made of. head_dim is 64, 96, 128 or 256; else it throws
// std::invalid_argument. Of half types of KV, queries and weights are rounded to them, and sums are
// of tensor cores.
void attend(Stream stream, const DeviceTables& tables, const AttendParams& params);

}  // namespace aegaeon::ops::cuda

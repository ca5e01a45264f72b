// Which attention kernels run for which tiles, of one type and width.
#pragma once

#include <algorithm>

#include "ops/cuda/attend_long.h"
#include "ops/cuda/attend_short.h"
#include "ops/cuda/ops.h"

namespace aegaeon::ops::cuda {

inline AttendCall call_of(const DeviceTables& tables, const AttendParams& params) {
  constexpr float kLog2E = 1.44269504F;
  const PagedKv& kv = params.kv;
  const StepBounds& bounds = tables.bounds;
  const LayerPages pages = {kv.pages, params.layer * 2 * kv.kv_heads, kv.kv_heads};
  const int heads = static_cast<int>(params.heads), kv_heads = static_cast<int>(kv.kv_heads);
  return {tables.short_tiles(), tables.long_tiles(),   tables.blocks(), bounds.short_queries,
          bounds.splits,        tables.workspace,      pages,           heads,
          heads / kv_heads,     params.scale * kLog2E, params.queries,  params.out};
}

template <typename T, int head_dim>
constexpr std::size_t kAttendShared =
    std::max(sizeof(ShortMemory<T, head_dim>), sizeof(LongMemory<T, head_dim>));

template <typename T, int head_dim>
void attend_as(Stream stream, const DeviceTables& tables, const AttendParams& params) {
  const AttendCall call = call_of(tables, params);
  const auto short_tiles = static_cast<unsigned>(tables.bounds.short_tiles);
  const auto long_tiles = static_cast<unsigned>(tables.bounds.long_tiles);
  const auto splits = static_cast<unsigned>(tables.bounds.splits);
  const auto heads = static_cast<unsigned>(params.kv.kv_heads);
  if (short_tiles > 0) {
    constexpr std::size_t kShared = sizeof(ShortMemory<T, head_dim>);
    launch(&attend_short<T, head_dim>, {{short_tiles, heads, splits}, kThreads, kShared}, stream,
           call);
    if (splits > 1) {
      launch(&join_splits<head_dim>, {{short_tiles, heads, 1}, kThreads, 0}, stream, call);
    }
  }
  if (long_tiles > 0) {
    constexpr std::size_t kShared = sizeof(LongMemory<T, head_dim>);
    launch(&attend_long<T, head_dim>,
           {{long_tiles, heads, 1}, kSharing<head_dim> * kThreads, kShared}, stream, call);
  }
}

}  // namespace aegaeon::ops::cuda

// attend: which kernels run for which tiles.

#include <stdexcept>
#include <string>

#include "ops/cuda/attend_long.h"
#include "ops/cuda/attend_short.h"
#include "ops/cuda/ops.h"

namespace aegaeon::ops::cuda {
namespace {

constexpr float kLog2E = 1.44269504F;

AttendCall call_of(const DeviceTables& tables, const AttendParams& params) {
  const PagedKv& kv = params.kv;
  const LayerPages pages = {kv.pages, params.layer * 2 * kv.kv_heads, kv.kv_heads};
  const int heads = static_cast<int>(params.heads);
  const StepBounds& bounds = tables.bounds;
  return {tables.short_tiles(),
          tables.long_tiles(),
          tables.blocks(),
          bounds.short_queries,
          bounds.splits,
          tables.workspace,
          pages,
          heads,
          heads / static_cast<int>(kv.kv_heads),
          params.scale * kLog2E,
          params.queries,
          params.out};
}

template <typename T, int head_dim>
void attend_as(Stream stream, const StepBounds& bounds, const AttendCall& call) {
  const auto tiles = static_cast<unsigned>(bounds.short_tiles);
  const auto heads = static_cast<unsigned>(call.kv.kv_heads);
  if (tiles > 0) {
    const auto splits = static_cast<unsigned>(bounds.splits);
    launch(&attend_short<T, head_dim>,
           {{tiles, heads, splits}, kThreads, sizeof(ShortMemory<T, head_dim>)}, stream, call);
    if (splits > 1) {
      launch(&join_splits<head_dim>, {{tiles, heads, 1}, kThreads, 0}, stream, call);
    }
  }
  if (bounds.long_tiles > 0) {
    launch(&attend_long<T, head_dim>,
           {{static_cast<unsigned>(bounds.long_tiles), heads, 1},
            kSharing<head_dim> * kThreads,
            sizeof(LongMemory<T, head_dim>)},
           stream, call);
  }
}

template <typename T>
void attend_with(Stream stream, const DeviceTables& tables, const AttendParams& params) {
  const AttendCall call = call_of(tables, params);
  switch (params.kv.head_dim) {
    case 64:
      return attend_as<T, 64>(stream, tables.bounds, call);
    case 96:
      return attend_as<T, 96>(stream, tables.bounds, call);
    case 128:
      return attend_as<T, 128>(stream, tables.bounds, call);
    case 256:
      return attend_as<T, 256>(stream, tables.bounds, call);
    default:
      throw std::invalid_argument("no kernel attends with a head_dim of " +
                                  std::to_string(params.kv.head_dim) +
                                  "; there are 64, 96, 128 and 256");
  }
}

}  // namespace

void attend(Stream stream, const DeviceTables& tables, const AttendParams& params) {
  switch (params.kv.type) {
    case KvType::f32:
      return attend_with<float>(stream, tables, params);
    case KvType::bf16:
      return attend_with<Bf16>(stream, tables, params);
    case KvType::f16:
      return attend_with<F16>(stream, tables, params);
  }
}

}  // namespace aegaeon::ops::cuda

#include <stdexcept>
#include <string>

#include "ops/cpu/thread_pool.h"
#include "ops/cpu/widen.h"
#include "ops/ops.h"

namespace aegaeon::ops {
namespace {

constexpr std::size_t kRowsPerClaim = 8;

template <WeightType type>
void embed_row(const EmbedParams& params, std::size_t row) {
  const std::size_t id = static_cast<std::size_t>(params.token_ids[row]);
  const char* const tile = static_cast<const char*>(params.table.tiles) +
                           id / kTileOutputs * tile_bytes(type, params.in_features);
  float* const out = params.out + row * params.in_features;
  for (std::size_t k = 0; k < params.in_features; ++k) {
    out[k] = weight_at<type>(tile, id % kTileOutputs, k);
  }
}

void embed_quantized_row(const EmbedParams& params, std::size_t row) {
  const std::size_t id = static_cast<std::size_t>(params.token_ids[row]);
  const char* const tile = static_cast<const char*>(params.table.tiles) +
                           id / kTileOutputs * tile_bytes(WeightType::i8, params.in_features);
  float* const out = params.out + row * params.in_features;
  for (std::size_t k = 0; k < params.in_features; ++k) {
    out[k] = dequantized(tile, id % kTileOutputs, k);
  }
}

void embed_rows(const EmbedParams& params, std::size_t first, std::size_t last) {
  for (std::size_t row = first; row < last; ++row) {
    switch (params.table.type) {
      case WeightType::f32:
        embed_row<WeightType::f32>(params, row);
        break;
      case WeightType::bf16:
        embed_row<WeightType::bf16>(params, row);
        break;
      case WeightType::f16:
        embed_row<WeightType::f16>(params, row);
        break;
      case WeightType::i8:
        embed_quantized_row(params, row);
        break;
    }
  }
}

}  // namespace

void embed(ThreadPool& pool, const EmbedParams& params) {
  for (std::size_t row = 0; row < params.rows; ++row) {
    const std::int64_t id = params.token_ids[row];
    if (id < 0 || static_cast<std::uint64_t>(id) >= params.table.out_features) {
      throw std::out_of_range("token id " + std::to_string(id) + " is outside the table of " +
                              std::to_string(params.table.out_features) + " rows");
    }
  }
  pool.for_ranges(params.rows, kRowsPerClaim,
                  [&](std::size_t first, std::size_t last) { embed_rows(params, first, last); });
}

}  // namespace aegaeon::ops

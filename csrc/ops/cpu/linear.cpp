// How `linear` is cut: rows into blocks and panels, outputs into tiles, columns into blocks that
// stay in the first cache while all panels of a block pass over them.

#include <algorithm>
#include <vector>

#include "ops/cpu/isa.h"
#include "ops/cpu/linear_panel.h"
#include "ops/cpu/panels.h"
#include "ops/cpu/thread_pool.h"
#include "ops/cpu/widen.h"
#include "ops/ops.h"

namespace aegaeon::ops {
namespace {

// Rows whose sums a thread holds at once.
constexpr std::size_t kBlockRows = 264;
// Bytes of a tile that all panels of a block pass over before the next are taken.
constexpr std::size_t kBlockBytes = 16 << 10;
// How far a single panel, which passes over weights as fast as memory gives them, fetches ahead of
// itself: over the ends of pages, where the processor's own prefetching stops.
constexpr std::size_t kAheadBytes = 1024;
// What one claim of a thread reads at least when there is a single panel: each claim is a new
// stream that memory has to get going.
constexpr std::size_t kStreamBytes = 128 << 10;
constexpr std::size_t kClaimsPerThread = 4;

PanelKernel kernel_for(WeightType type) {
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

// Lays the rows of a panel side by side: [in_features][rows].
void pack_panel(const LinearParams& params, const Panels& panels, std::size_t panel,
                float* packed) {
  const std::size_t rows = panels.rows(panel), first = panels.first_row(panel);
  float* const to = packed + first * params.in_features;
  for (std::size_t r = 0; r < rows; ++r) {
    const float* const from = params.x + (first + r) * params.in_features;
    for (std::size_t k = 0; k < params.in_features; ++k) {
      to[k * rows + r] = from[k];
    }
  }
}

// The packed rows; x itself where every panel is one row.
const float* pack(ThreadPool& pool, const LinearParams& params, const Panels& panels) {
  if (panels.count() == params.rows) return params.x;
  // Kept, as large as it ever was: aegaeon/memory/workspace.py counts it in what a pass takes.
  thread_local std::vector<float> packed;
  if (packed.size() < params.rows * params.in_features) {
    packed.resize(params.rows * params.in_features);
  }
  float* const to = packed.data();
  pool.for_ranges(panels.count(), 8, [&](std::size_t first, std::size_t last) {
    for (std::size_t panel = first; panel < last; ++panel) {
      pack_panel(params, panels, panel, to);
    }
  });
  return to;
}

// A part of the projection as one thread sees it.
struct Part {
  const LinearParams& params;
  const Matrix& matrix;
  const float* bias;
  std::size_t first_output;
  std::size_t out_stride;
  PanelKernel kernel;
  const float* packed;
  const Panels& panels;

  void tile(std::size_t tile, std::size_t first_panel, std::size_t last_panel) const;
  void write(std::size_t tile, std::size_t first_row, std::size_t last_row, float* sums) const;
};

// Writes the sums of rows first_row .. last_row, which begin at `sums`, to their outputs.
void Part::write(std::size_t tile, std::size_t first_row, std::size_t last_row, float* sums) const {
  const std::size_t begin = tile * kTileOutputs;
  const std::size_t count = std::min(kTileOutputs, matrix.out_features - begin);
  for (std::size_t row = first_row; row < last_row; ++row, sums += kTileOutputs) {
    const std::size_t at = row * out_stride + first_output + begin;
    kernel.finish(sums, sums);
    if (bias != nullptr) {
      for (std::size_t output = 0; output < count; ++output) sums[output] += bias[begin + output];
    }
    if (params.residual != nullptr) {
      const float* const added = params.residual + at;
      for (std::size_t output = 0; output < count; ++output) sums[output] += added[output];
    }
    std::copy_n(sums, count, params.out + at);
  }
}

void Part::tile(std::size_t tile, std::size_t first_panel, std::size_t last_panel) const {
  thread_local std::vector<float> sums(kBlockRows * kTileOutputs);
  const std::size_t columns = params.in_features;
  const std::size_t line_bytes = kTileOutputs * element_bytes(matrix.type);
  const char* const weights = static_cast<const char*>(matrix.tiles) + tile * columns * line_bytes;
  const std::size_t begin_row = panels.first_row(first_panel);
  const bool is_single = last_panel - first_panel == 1;
  const bool is_streamed = is_single && panels.rows(first_panel) <= 2;
  const std::size_t block = is_streamed ? columns : kBlockBytes / line_bytes;
  // While panels pass over a block, the next one comes in; the last one's next is the next tile.
  const std::size_t ahead = is_single ? kAheadBytes : kBlockBytes;
  for (std::size_t k = 0; k < columns; k += block) {
    for (std::size_t panel = first_panel; panel < last_panel; ++panel) {
      const std::size_t rows = panels.rows(panel), row = panels.first_row(panel);
      kernel.accumulate({packed + row * columns + k * rows, rows, weights + k * line_bytes,
                         std::min(block, columns - k),
                         sums.data() + (row - begin_row) * kTileOutputs, k == 0, ahead});
    }
  }
  const std::size_t end_row = panels.first_row(last_panel - 1) + panels.rows(last_panel - 1);
  write(tile, begin_row, end_row, sums.data());
}

std::size_t tiles_per_claim(std::size_t tiles, std::size_t tile_bytes, unsigned threads,
                            bool is_single) {
  const std::size_t fair = tiles / (threads * kClaimsPerThread * (is_single ? 1 : 4)) + 1;
  const std::size_t least = is_single ? std::max<std::size_t>(1, kStreamBytes / tile_bytes) : 1;
  return std::min(std::max(fair, least), (tiles + threads - 1) / threads);
}

}  // namespace

void linear(ThreadPool& pool, const LinearParams& params) {
  if (params.rows == 0) return;
  std::size_t out_stride = 0;
  for (std::size_t at = 0; at < params.part_count; ++at) {
    out_stride += params.parts[at].matrix.out_features;
  }
  const Panels panels(params.rows, kernel_for(WeightType::f32).max_rows);
  const float* const packed = pack(pool, params, panels);
  std::size_t first_output = 0;
  for (std::size_t at = 0; at < params.part_count; ++at) {
    const Matrix& matrix = params.parts[at].matrix;
    const Part part{params,       matrix,     params.parts[at].bias,
                    first_output, out_stride, kernel_for(matrix.type),
                    packed,       panels};
    const std::size_t block = std::max<std::size_t>(1, kBlockRows / part.kernel.max_rows);
    const std::size_t tiles = (matrix.out_features + kTileOutputs - 1) / kTileOutputs;
    for (std::size_t first = 0; first < panels.count(); first += block) {
      const std::size_t last = std::min(first + block, panels.count());
      const std::size_t bytes = params.in_features * kTileOutputs * element_bytes(matrix.type);
      const std::size_t grain = tiles_per_claim(tiles, bytes, pool.threads(), last - first == 1);
      pool.for_ranges(tiles, grain, [&](std::size_t begin, std::size_t end) {
        for (std::size_t tile = begin; tile < end; ++tile) part.tile(tile, first, last);
      });
    }
    first_output += matrix.out_features;
  }
}

}  // namespace aegaeon::ops

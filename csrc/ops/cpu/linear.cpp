// How `linear` and `gated` are cut: rows into blocks and panels, outputs into tiles, inputs into
// blocks that stay in the first cache while all panels of a block pass over them.

#include <algorithm>
#include <cstring>
#include <vector>

#include "ops/cpu/kept.h"
#include "ops/cpu/kernel_choice.h"
#include "ops/cpu/linear_operand.h"
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
// A single panel of so few rows reads a tile from end to end, and of so few waits for memory at
// each line; with more, x passes through the first cache, and multiplying takes longer (both as
// measured with AVX-512 on weights of 220 MB: 2 rows of 3072 inputs fill half of that cache).
constexpr std::size_t kMostStreamedRows = 2;
constexpr std::size_t kMostWaitingRows = 4;
// How far panels that wait for memory fetch ahead of themselves: over the ends of pages, where the
// processor's own prefetching stops.
constexpr std::size_t kAheadBytes = 512;
// And how far others do, which compute on a line for as long as memory takes to bring one: into the
// first cache, for what is to come to the second one comes late (8 rows: 130 GFLOP/s instead of
// 170).
constexpr std::size_t kFarAheadBytes = 2048;
// What one claim of a thread reads at least when there is a single panel: each claim is a new
// stream that memory has to get going.
constexpr std::size_t kStreamBytes = 128 << 10;

// The panels that pass over a tile together.
struct Block {
  const Panels& panels;
  std::size_t first;
  std::size_t last;

  std::size_t first_row() const { return panels.first_row(first); }
  std::size_t last_row() const { return panels.first_row(last); }
  bool is_single() const { return last - first == 1; }
};

// The product of the packed rows with one matrix.
class Product {
 public:
  Product(const BiasedMatrix& part, std::size_t in_features)
      : matrix_(part.matrix),
        bias_(part.bias),
        in_features_(in_features),
        kernel_(kernel_for(part.matrix)) {}

  XForm form() const { return kernel_.form; }
  // The rows in that form; before the first sum.
  void set_x(const void* x) { x_ = static_cast<const char*>(x); }

  std::size_t tiles() const { return (matrix_.out_features + kTileOutputs - 1) / kTileOutputs; }
  std::size_t bytes() const { return tile_bytes(matrix_.type, in_features_); }
  std::size_t out_features() const { return matrix_.out_features; }
  // Outputs of a tile that are there.
  std::size_t outputs(std::size_t tile) const {
    return std::min(kTileOutputs, matrix_.out_features - tile * kTileOutputs);
  }

  // Writes 32 outputs for each row of the block, to which the bias is still to be added.
  void sum(std::size_t tile, const Block& block, float* sums) const;
  void add_bias(std::size_t tile, float* sums) const;

 private:
  Matrix matrix_;
  const float* bias_;
  std::size_t in_features_;
  const char* x_ = nullptr;
  PanelKernel kernel_;
};

void Product::sum(std::size_t tile, const Block& block, float* sums) const {
  constexpr std::size_t kWord = 4;
  const Step step = step_of(matrix_.type);
  const char* const weights = static_cast<const char*>(matrix_.tiles) + tile * bytes();
  const std::size_t row_words = x_words(kernel_.form, in_features_);
  const std::size_t step_words = x_words(kernel_.form, step.inputs);
  const bool is_streamed = block.is_single() && block.panels.rows(block.first) <= kMostStreamedRows;
  const std::size_t inputs = is_streamed ? in_features_ : kBlockBytes / step.bytes * step.inputs;
  const bool is_waiting = block.is_single() && block.panels.rows(block.first) <= kMostWaitingRows;
  const std::size_t ahead = is_waiting ? kAheadBytes : kFarAheadBytes;
  for (std::size_t k = 0; k < in_features_; k += inputs) {
    const std::size_t steps = k / step.inputs;
    for (std::size_t panel = block.first; panel < block.last; ++panel) {
      const std::size_t rows = block.panels.rows(panel), row = block.panels.first_row(panel);
      const char* const x = x_ + (row * row_words + steps * step_words * rows) * kWord;
      kernel_.accumulate({x, rows, weights + steps * step.bytes, std::min(inputs, in_features_ - k),
                          sums + (row - block.first_row()) * kTileOutputs, k == 0, ahead});
    }
  }
}

void Product::add_bias(std::size_t tile, float* sums) const {
  if (bias_ == nullptr) return;
  const float* const bias = bias_ + tile * kTileOutputs;
  const std::size_t count = outputs(tile);
  for (std::size_t output = 0; output < count; ++output) sums[output] += bias[output];
}

// The parts of a projection over the same rows.
class Products {
 public:
  Products(ThreadPool& pool, const Operand& operand, const BiasedMatrix* parts, std::size_t count) {
    products_.reserve(count);
    bool is_wanted[kXForms] = {};
    std::size_t words = 0;
    for (std::size_t at = 0; at < count; ++at) {
      const XForm form = products_.emplace_back(parts[at], operand.in_features).form();
      bool& is_known = is_wanted[static_cast<int>(form)];
      if (!is_known) words += packed_words(operand, form);
      is_known = true;
    }
    thread_local std::vector<Word> memory;
    Word* free = at_least(memory, words);
    const void* packed[kXForms] = {};
    for (Product& product : products_) {
      const void*& x = packed[static_cast<int>(product.form())];
      if (x == nullptr) {
        x = pack_operand(pool, operand, product.form(), free);
        free += packed_words(operand, product.form());
      }
      product.set_x(x);
    }
  }

  const Product& operator[](std::size_t part) const { return products_[part]; }
  const Product* begin() const { return products_.data(); }
  const Product* end() const { return products_.data() + products_.size(); }

 private:
  std::vector<Product> products_;
};

Panels panels_of(std::size_t rows, const BiasedMatrix* parts, std::size_t count) {
  std::size_t max_rows = kBlockRows;
  for (std::size_t at = 0; at < count; ++at) {
    max_rows = std::min(max_rows, kernel_for(parts[at].matrix).max_rows);
  }
  return {rows, max_rows};
}

struct Tiles {
  std::size_t count;
  std::size_t bytes;  // of each
};

// Calls work(tile, block, sums), sums of `tiles_at_once` tiles, for every tile and block of panels.
template <typename Work>
void share_out(ThreadPool& pool, const Panels& panels, const Tiles& tiles,
               std::size_t tiles_at_once, const Work& work) {
  const std::size_t most = std::max<std::size_t>(1, kBlockRows / panels.rows(0));
  const std::size_t blocks = (panels.count() + most - 1) / most;
  const std::size_t count = (panels.count() + blocks - 1) / blocks;  // each block reads the weights
  for (std::size_t first = 0; first < panels.count(); first += count) {
    const Block block{panels, first, std::min(first + count, panels.count())};
    const std::size_t least =
        block.is_single() ? std::max<std::size_t>(1, kStreamBytes / tiles.bytes) : 1;
    const auto take = [&](std::size_t begin, std::size_t end) {
      thread_local std::vector<float> memory;
      float* const sums = at_least(memory, tiles_at_once * kBlockRows * kTileOutputs);
      for (std::size_t tile = begin; tile < end; ++tile) work(tile, block, sums);
    };
    pool.for_tapering(tiles.count, least, take);
  }
}

// Where a part's outputs lie in a row of the result.
struct Place {
  std::size_t first;
  std::size_t stride;
};

// A row of a tile, of which nearly all are whole: of a known length it needs no call.
void copy_outputs(const float* sums, std::size_t count, float* out) {
  if (count == kTileOutputs) {
    std::memcpy(out, sums, kTileOutputs * sizeof *out);
  } else {
    std::copy_n(sums, count, out);
  }
}

// Writes the sums of a tile's rows to their outputs.
void write(const LinearParams& params, const Product& product, const Place& place, std::size_t tile,
           const Block& block, float* sums) {
  const std::size_t count = product.outputs(tile);
  for (std::size_t row = block.first_row(); row < block.last_row(); ++row, sums += kTileOutputs) {
    const std::size_t at = row * place.stride + place.first + tile * kTileOutputs;
    product.add_bias(tile, sums);
    if (params.residual != nullptr) {
      const float* const added = params.residual + at;
      for (std::size_t output = 0; output < count; ++output) sums[output] += added[output];
    }
    copy_outputs(sums, count, params.out + at);
  }
}

}  // namespace

void linear(ThreadPool& pool, const LinearParams& params) {
  if (params.rows == 0) return;
  const Panels panels = panels_of(params.rows, params.parts, params.part_count);
  const Products products(pool, {params.x, params.in_features, panels}, params.parts,
                          params.part_count);
  Tiles tiles{0, 1};
  std::size_t stride = 0;
  for (const Product& product : products) {
    tiles = {tiles.count + product.tiles(), std::max(tiles.bytes, product.bytes())};
    stride += product.out_features();
  }
  // Tiles of all parts are one line of work: threads meet once.
  share_out(pool, panels, tiles, 1, [&](std::size_t tile, const Block& block, float* sums) {
    const Product* product = products.begin();
    Place place{0, stride};
    for (; tile >= product->tiles(); ++product) {
      tile -= product->tiles();
      place.first += product->out_features();
    }
    product->sum(tile, block, sums);
    write(params, *product, place, tile, block, sums);
  });
}

void gated(ThreadPool& pool, const GatedParams& params) {
  if (params.rows == 0) return;
  const Panels panels = panels_of(params.rows, params.gate_up, 2);
  const Products products(pool, {params.x, params.in_features, panels}, params.gate_up, 2);
  const Product &gate = products[0], &up = products[1];
  const auto let_through = row_kernels().gate;
  const Tiles tiles{gate.tiles(), gate.bytes() + up.bytes()};
  share_out(pool, panels, tiles, 2, [&](std::size_t tile, const Block& block, float* sums) {
    float* ups = sums + kBlockRows * kTileOutputs;
    gate.sum(tile, block, sums);
    up.sum(tile, block, ups);
    for (std::size_t row = block.first_row(); row < block.last_row(); ++row) {
      gate.add_bias(tile, sums);
      up.add_bias(tile, ups);
      let_through(sums, ups);
      copy_outputs(sums, gate.outputs(tile),
                   params.out + row * gate.out_features() + tile * kTileOutputs);
      sums += kTileOutputs;
      ups += kTileOutputs;
    }
  });
}

}  // namespace aegaeon::ops

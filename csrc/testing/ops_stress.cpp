// Operators under the sanitizers, and every instruction set that this processor has
// against plain formulas: `ops_stress`.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ops/cpu/isa.h"
#include "ops/cpu/narrow.h"
#include "ops/cpu/thread_pool.h"
#include "ops/cpu/widen.h"
#include "ops/ops.h"
#include "ops/sampling.h"
#include "testing/stress.h"

namespace {

using namespace aegaeon::ops;
using namespace aegaeon::testing;

std::uint16_t draw_half(WeightType type) {
  const std::uint32_t bits = random_bits();
  // Magnitudes about 1; f16 has subnormals among them.
  return static_cast<std::uint16_t>(type == WeightType::bf16 ? (bits & 0x83FFU) | 0x3C00U
                                                             : bits & 0xBFFFU);
}

// Fills groups with any weights, and scales between 2^-7 and 2^-6.
void draw_groups(char* to, std::size_t tiles, std::size_t columns) {
  for (std::size_t tile = 0; tile < tiles; ++tile) {
    for (std::size_t k = 0; k < columns; k += kGroupInputs) {
      for (std::size_t output = 0; output < kTileOutputs; ++output, to += 2) {
        const auto scale = static_cast<std::uint16_t>((random_bits() & 0x7FU) | 0x3C00U);
        std::memcpy(to, &scale, sizeof scale);
      }
      const std::size_t inputs = (std::min(kGroupInputs, columns - k) + 1) / 2 * 2;
      for (std::size_t i = 0; i < inputs * kTileOutputs; ++i, ++to) {
        *to = static_cast<char>(static_cast<int>(random_bits() % 255U) - 127);
      }
    }
  }
}

// Tiles on the heap and to the byte, so that a read beyond them is found.
struct Tiles {
  struct Free {
    void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
  };
  std::unique_ptr<char[], Free> memory;
  Matrix matrix;
  std::size_t columns;

  Tiles(std::size_t outputs, std::size_t in_features, WeightType type, XType x_type)
      : columns(in_features) {
    const std::size_t tiles = (outputs + kTileOutputs - 1) / kTileOutputs;
    const std::size_t count = tiles * columns * kTileOutputs;
    memory.reset(static_cast<char*>(
        ::operator new[](tiles * tile_bytes(type, columns), std::align_val_t{64})));
    matrix = {memory.get(), outputs, type, x_type};
    if (type == WeightType::i8) {
      draw_groups(memory.get(), tiles, columns);
    } else if (type == WeightType::f32) {
      const std::vector<float> values = draw(count);
      std::memcpy(memory.get(), values.data(), count * sizeof(float));
    } else {
      auto* const halves = reinterpret_cast<std::uint16_t*>(memory.get());
      for (std::size_t i = 0; i < count; ++i) halves[i] = draw_half(type);
    }
  }

  float at(std::size_t output, std::size_t k) const {
    const char* const tile =
        memory.get() + output / kTileOutputs * tile_bytes(matrix.type, columns);
    const std::size_t of_tile = output % kTileOutputs;
    switch (matrix.type) {
      case WeightType::i8:
        return dequantized(tile, of_tile, k);
      case WeightType::f32:
        return weight_at<WeightType::f32>(tile, of_tile, k);
      case WeightType::bf16:
        return weight_at<WeightType::bf16>(tile, of_tile, k);
      default:
        return weight_at<WeightType::f16>(tile, of_tile, k);
    }
  }
};

// What x[k] may have lost when it was rounded to 16 bits.
double rounding(const Tiles& tiles, const float* x, std::size_t k) {
  if (tiles.matrix.x_type == XType::bf16) return std::fabs(static_cast<double>(x[k])) / 256;
  if (tiles.matrix.type != WeightType::i8) return 0;
  const std::size_t first = k / kGroupInputs * kGroupInputs;
  double largest = 0;
  for (std::size_t i = first; i < std::min(first + kGroupInputs, tiles.columns); ++i) {
    largest = std::max(largest, std::fabs(static_cast<double>(x[i])));
  }
  return largest * 1.01 / 65534;
}

void check_product(const Tiles& tiles, const std::vector<float>& x, const std::vector<float>& out) {
  const std::size_t outputs = tiles.matrix.out_features, columns = tiles.columns;
  std::vector<double> lost(columns);
  for (std::size_t row = 0; row < out.size() / outputs; ++row) {
    const float* const from = x.data() + row * columns;
    for (std::size_t k = 0; k < columns; ++k) lost[k] = rounding(tiles, from, k);
    for (std::size_t c = 0; c < outputs; ++c) {
      double sum = 0, bound = 1e-30;
      for (std::size_t k = 0; k < columns; ++k) {
        const double weight = tiles.at(c, k);
        sum += from[k] * weight;
        bound += 1e-6 * std::fabs(from[k] * weight);
        bound += lost[k] * std::fabs(weight);
      }
      require(std::fabs(out[row * outputs + c] - sum) <= bound, "a product is wrong");
    }
  }
}

std::vector<float> multiply(ThreadPool& pool, const Tiles& tiles, const std::vector<float>& x) {
  const std::size_t rows = x.size() / tiles.columns;
  std::vector<float> out(rows * tiles.matrix.out_features);
  const BiasedMatrix part{tiles.matrix, nullptr};
  linear(pool, {x.data(), rows, tiles.columns, &part, 1, nullptr, out.data()});
  return out;
}

// A gate and what it lets through, against the products of both alone.
void check_gated(ThreadPool& pool, const Tiles& gate, const Tiles& up,
                 const std::vector<float>& x) {
  const std::vector<float> gates = multiply(pool, gate, x), ups = multiply(pool, up, x);
  std::vector<float> out(gates.size());
  const BiasedMatrix parts[] = {{gate.matrix, nullptr}, {up.matrix, nullptr}};
  gated(pool, {x.data(), x.size() / gate.columns, gate.columns, parts, out.data()});
  for (std::size_t i = 0; i < out.size(); ++i) {
    const double wide = gates[i];
    const double expected = wide / (1 + std::exp(-wide)) * ups[i];
    require(std::fabs(out[i] - expected) <= 1e-6 * (1 + std::fabs(expected)), "a gate is wrong");
  }
}

bool force(const char* isa) {
  try {
    force_isa(isa);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

constexpr std::pair<WeightType, XType> kTypes[] = {{WeightType::f32, XType::f32},
                                                   {WeightType::bf16, XType::f32},
                                                   {WeightType::bf16, XType::bf16},
                                                   {WeightType::f16, XType::f32},
                                                   {WeightType::i8, XType::f32}};
constexpr const char* kIsas[] = {"baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16"};

// All shapes on all instruction sets; those that fuse agree to the bit.
void check_products() {
  ThreadPool alone{1}, several{3};
  constexpr std::size_t kShapes[][3] = {{1, 33, 70},  {2, 1, 1},     {5, 129, 32},  {6, 7, 31},
                                        {13, 64, 65}, {40, 300, 96}, {280, 130, 40}};
  for (const auto& [rows, inputs, outputs] : kShapes) {
    for (const auto& [type, x_type] : kTypes) {
      // Of bf16 there are pairs.
      const std::size_t columns = inputs + (type == WeightType::bf16 ? inputs % 2 : 0);
      const Tiles tiles(outputs, columns, type, x_type), other(outputs, columns, type, x_type);
      const std::vector<float> x = draw(rows * columns);
      std::vector<float> fused;
      for (const char* isa : kIsas) {
        if (!force(isa)) continue;
        const std::vector<float> out = multiply(several, tiles, x);
        check_product(tiles, x, out);
        check_gated(several, tiles, other, x);
        require(out == multiply(alone, tiles, x), "threads change bits");
        if (std::strcmp(isa, "baseline") == 0) continue;
        require(fused.empty() || fused == out, "sets that fuse differ");
        fused = out;
      }
    }
  }
  force_isa("best");
}

// One sequence; queries, keys and values are one row of `qkv` each, and pages, on the heap and to
// the byte, hold NaN where nobody has written.
struct Sequence {
  std::size_t tokens, heads;
  std::vector<float> qkv;
  std::vector<std::uint16_t> pages;
  PagedKv kv;

  Sequence(std::size_t count, std::size_t groups, std::size_t kv_heads, std::size_t head_dim,
           KvType type)
      : tokens(count), heads(groups * kv_heads), kv{nullptr, kv_heads, head_dim, {}, type} {
    qkv = draw(tokens * stride());
    SequenceRows rows{0, tokens, 0, {}};
    const std::size_t blocks = (tokens + kBlockTokens - 1) / kBlockTokens;
    for (std::size_t at = blocks; at-- > 0;) rows.blocks.push_back(at * 2 * kv_heads);
    kv.sequences = {rows};
    pages.assign(blocks * 2 * kv_heads * kv.page_bytes() / 2, 0x7FFF);
    kv.pages = pages.data();
  }

  std::size_t stride() const { return (heads + 2 * kv.kv_heads) * kv.head_dim; }

  // Appends all rows, then attends those from `first` on.
  std::vector<float> run(ThreadPool& pool, std::size_t first) {
    const std::size_t width = heads * kv.head_dim;
    const float* const keys = qkv.data() + width;
    append_kv(pool, {kv, 0, {keys, stride()}, {keys + kv.kv_heads * kv.head_dim, stride()}});
    std::vector<float> queries, out((tokens - first) * width);
    for (std::size_t row = first; row < tokens; ++row) {
      const auto from = qkv.begin() + static_cast<std::ptrdiff_t>(row * stride());
      queries.insert(queries.end(), from, from + static_cast<std::ptrdiff_t>(width));
    }
    PagedKv rest = kv;
    rest.sequences[0].rows = tokens - first;
    rest.sequences[0].start = first;
    attend(pool, {rest, 0, heads, queries.data(), 0.2F, out.data()});
    return out;
  }

  // Element i of token t's keys (0) or values (1), as it is stored.
  double stored(std::size_t t, std::size_t which, std::size_t head, std::size_t i) const {
    const std::size_t at = (heads + which * kv.kv_heads + head) * kv.head_dim + i;
    const float value = qkv[t * stride() + at];
    return kv.type == KvType::f32 ? value : widen_bf16(narrow_bf16(value));
  }

  // The last row of a head in double.
  std::vector<double> last(std::size_t head) const {
    const float* const query = qkv.data() + (tokens - 1) * stride() + head * kv.head_dim;
    const std::size_t kv_head = head / (heads / kv.kv_heads);
    std::vector<double> sums(kv.head_dim + 1);
    for (std::size_t t = 0; t < tokens; ++t) {
      double score = 0;
      for (std::size_t i = 0; i < kv.head_dim; ++i) score += query[i] * stored(t, 0, kv_head, i);
      const double weight = std::exp(score * 0.2);
      for (std::size_t i = 0; i < kv.head_dim; ++i) sums[i] += weight * stored(t, 1, kv_head, i);
      sums[kv.head_dim] += weight;
    }
    for (std::size_t i = 0; i < kv.head_dim; ++i) sums[i] /= sums[kv.head_dim];
    return sums;
  }
};

void check_last_row(const Sequence& sequence, const std::vector<float>& out) {
  const std::size_t head_dim = sequence.kv.head_dim;
  const float* const row = out.data() + out.size() - sequence.heads * head_dim;
  for (std::size_t head = 0; head < sequence.heads; ++head) {
    const std::vector<double> expected = sequence.last(head);
    for (std::size_t i = 0; i < head_dim; ++i) {
      require(std::fabs(row[head * head_dim + i] - expected[i]) < 1e-4, "attention is wrong");
    }
  }
}

// Long and short contexts of both types, alone and shared out, whole and of the last rows only.
void check_attention() {
  ThreadPool alone{1}, several{3};
  constexpr std::size_t kShapes[][4] = {
      {1, 1, 1, 1}, {45, 3, 2, 24}, {530, 1, 2, 33}, {1100, 7, 1, 64}, {1600, 2, 2, 20}};
  for (const auto& [tokens, group, kv_heads, head_dim] : kShapes) {
    for (const KvType type : {KvType::f32, KvType::bf16}) {
      Sequence sequence(tokens, group, kv_heads, head_dim, type);
      const std::size_t first = tokens - std::min<std::size_t>(tokens, 40);
      std::vector<float> fused;
      for (const char* isa : kIsas) {
        if (!force(isa)) continue;
        const std::vector<float> out = sequence.run(alone, first);
        check_last_row(sequence, out);
        require(out == sequence.run(several, first), "threads change attention");
        const std::vector<float> row = sequence.run(several, tokens - 1);
        require(std::equal(row.rbegin(), row.rend(), out.rbegin()), "a cut changes attention");
        if (std::strcmp(isa, "baseline") == 0) continue;
        require(fused.empty() || fused == out, "avx2 and avx512 differ in attention");
        fused = out;
      }
    }
  }
  force_isa("best");
}

std::vector<std::optional<std::size_t>> sample_all(ThreadPool& pool, const std::vector<float>& x,
                                                   const std::vector<Draw>& draws) {
  std::vector<std::optional<std::size_t>> tokens(draws.size());
  sample(pool, {x.data(), draws.size(), x.size() / draws.size(), draws.data(), tokens.data()});
  return tokens;
}

// Rows of a length that is a multiple of nothing, every filter; tests/native has the formulas.
void check_sampling() {
  ThreadPool alone{1}, several{3};
  for (const std::size_t vocab : {1, 63, 130, 1029, 9001}) {
    std::vector<Draw> draws;
    for (std::size_t i = 0; i < 24; ++i) {
      draws.push_back({i % 4 * 0.4, i % 3 * vocab / 3,
                       i % 5 == 0 ? 1.0 : 0.3 * static_cast<double>(i % 5) - 0.3, i % 2 * 0.01, i,
                       i * i});
    }
    std::vector<float> x = draw(draws.size() * vocab);
    std::vector<std::optional<std::size_t>> first;
    for (const char* isa : {"baseline", "avx2", "avx512"}) {
      if (!force(isa)) continue;
      const auto tokens = sample_all(several, x, draws);
      require(tokens == sample_all(alone, x, draws), "threads change tokens");
      require(first.empty() || first == tokens, "instruction sets disagree on tokens");
      first = tokens;
      for (const auto& token : tokens) require(token && *token < vocab, "no token of the row");
    }
    std::vector<float> other = x;
    other[vocab - 1] = INFINITY;
    auto expected = first;
    expected[0].reset();
    require(sample_all(several, other, draws) == expected, "a bad row shows in others");
  }
  force_isa("best");
}

}  // namespace

int main() {
  check_products();
  check_attention();
  check_sampling();
  std::printf("ops_stress: ok\n");
}

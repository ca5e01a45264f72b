// Operators and thread pool under the sanitizers, and every instruction set that this processor has
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
#include <vector>

#include "ops/cpu/isa.h"
#include "ops/cpu/thread_pool.h"
#include "ops/cpu/widen.h"
#include "ops/ops.h"
#include "ops/sampling.h"

namespace {

using namespace aegaeon::ops;

void require(bool claim, const std::string& what) {
  if (!claim) {
    std::fprintf(stderr, "ops_stress: %s\n", what.c_str());
    std::exit(1);
  }
}

std::mt19937 random_bits{7};

std::vector<float> draw(std::size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random_bits);
  return values;
}

std::uint16_t draw_half(WeightType type) {
  const std::uint32_t bits = random_bits();
  // Magnitudes about 1; f16 has subnormals among them.
  return static_cast<std::uint16_t>(type == WeightType::bf16 ? (bits & 0x83FFU) | 0x3C00U
                                                             : bits & 0xBFFFU);
}

// Tiles on the heap and to the byte, so that a read beyond them is found.
struct Tiles {
  struct Free {
    void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
  };
  std::unique_ptr<char[], Free> memory;
  Matrix matrix;
  std::size_t columns;

  Tiles(std::size_t outputs, std::size_t in_features, WeightType type) : columns(in_features) {
    const std::size_t tiles = (outputs + kTileOutputs - 1) / kTileOutputs;
    const std::size_t count = tiles * columns * kTileOutputs;
    memory.reset(
        static_cast<char*>(::operator new[](count * element_bytes(type), std::align_val_t{64})));
    matrix = {memory.get(), outputs, type};
    if (type == WeightType::f32) {
      const std::vector<float> values = draw(count);
      std::memcpy(memory.get(), values.data(), count * sizeof(float));
    } else {
      auto* const halves = reinterpret_cast<std::uint16_t*>(memory.get());
      for (std::size_t i = 0; i < count; ++i) halves[i] = draw_half(type);
    }
  }

  float at(std::size_t output, std::size_t k) const {
    const std::size_t index =
        (output / kTileOutputs * columns + k) * kTileOutputs + output % kTileOutputs;
    switch (matrix.type) {
      case WeightType::f32:
        return widen_at<WeightType::f32>(memory.get(), index);
      case WeightType::bf16:
        return widen_at<WeightType::bf16>(memory.get(), index);
      default:
        return widen_at<WeightType::f16>(memory.get(), index);
    }
  }
};

void check_product(const Tiles& tiles, const std::vector<float>& x, const std::vector<float>& out) {
  const std::size_t outputs = tiles.matrix.out_features, columns = tiles.columns;
  for (std::size_t row = 0; row < out.size() / outputs; ++row) {
    for (std::size_t c = 0; c < outputs; ++c) {
      double sum = 0, size = 0;
      for (std::size_t k = 0; k < columns; ++k) {
        const double product = static_cast<double>(x[row * columns + k]) * tiles.at(c, k);
        sum += product;
        size += std::fabs(product);
      }
      require(std::fabs(out[row * outputs + c] - sum) <= 1e-6 * size + 1e-30, "a product is wrong");
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

bool force(const char* isa) {
  try {
    force_isa(isa);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

// All shapes on all instruction sets; those that fuse agree to the bit.
void check_products() {
  ThreadPool alone{1}, several{3};
  constexpr std::size_t kShapes[][3] = {{1, 33, 70},  {2, 1, 1},     {5, 129, 32},  {6, 7, 31},
                                        {13, 64, 65}, {40, 300, 96}, {280, 130, 40}};
  for (const auto& [rows, columns, outputs] : kShapes) {
    for (const WeightType type : {WeightType::f32, WeightType::bf16, WeightType::f16}) {
      const Tiles tiles(outputs, columns, type);
      const std::vector<float> x = draw(rows * columns);
      std::vector<float> fused;
      for (const char* isa : {"baseline", "avx2", "avx512"}) {
        if (!force(isa)) continue;
        const std::vector<float> out = multiply(several, tiles, x);
        check_product(tiles, x, out);
        require(out == multiply(alone, tiles, x), "threads change bits");
        if (std::strcmp(isa, "baseline") == 0) continue;
        require(fused.empty() || fused == out, "avx2 and avx512 differ");
        fused = out;
      }
    }
  }
  force_isa("best");
}

// Attention of rows 0 .. tokens - 1, whose keys and values go to their blocks first.
std::vector<float> attend_all(ThreadPool& pool, PagedKv& kv, const std::vector<float>& qkv,
                              std::size_t heads, std::size_t tokens) {
  const std::size_t stride = (heads + 2 * kv.kv_heads) * kv.head_dim;
  const float* const keys = qkv.data() + heads * kv.head_dim;
  append_kv(pool, {kv, 0, {keys, stride}, {keys + kv.kv_heads * kv.head_dim, stride}});
  std::vector<float> queries, out(tokens * heads * kv.head_dim);
  for (std::size_t row = 0; row < tokens; ++row) {
    const auto from = qkv.begin() + static_cast<std::ptrdiff_t>(row * stride);
    queries.insert(queries.end(), from, from + static_cast<std::ptrdiff_t>(heads * kv.head_dim));
  }
  attend(pool, {kv, 0, heads, queries.data(), 0.2F, out.data()});
  return out;
}

void check_attention() {
  ThreadPool alone{1}, several{3};
  constexpr std::size_t kTokens = 45, kHeads = 6, kKvHeads = 2, kHeadDim = 24;
  const std::vector<float> qkv = draw(kTokens * (kHeads + 2 * kKvHeads) * kHeadDim);
  std::vector<float> pages(3 * 2 * kKvHeads * kBlockTokens * kHeadDim, NAN), first;
  PagedKv kv{pages.data(), kKvHeads, kHeadDim, {{0, kTokens, 0, {8, 0, 4}}}};
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (!force(isa)) continue;
    const std::vector<float> out = attend_all(several, kv, qkv, kHeads, kTokens);
    require(out == attend_all(alone, kv, qkv, kHeads, kTokens), "threads change attention");
    if (first.empty()) first = out;
    for (std::size_t i = 0; i < out.size(); ++i) {
      require(std::fabs(out[i] - first[i]) < 1e-5F, "instruction sets disagree on attention");
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

// Many short jobs from two callers, with pauses that let workers fall asleep.
void press_pool() {
  ThreadPool pool{4};
  const auto call = [&pool](unsigned seed) {
    std::mt19937 choose{seed};
    for (int job = 0; job < 3000; ++job) {
      std::vector<int> done(choose() % 50 + 1);
      pool.for_ranges(done.size(), choose() % 4 + 1, [&done](std::size_t from, std::size_t to) {
        for (std::size_t i = from; i < to; ++i) ++done[i];
      });
      require(std::all_of(done.begin(), done.end(), [](int n) { return n == 1; }),
              "an item was left out or done twice");
      if (job % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  };
  std::thread other(call, 1);
  call(2);
  other.join();
  for (int i = 0; i < 50; ++i) ThreadPool{3};  // stopped while they start
}

// What is thrown in one call, the caller's or a worker's, comes out of the pool, which serves on.
void throw_in_pool() {
  ThreadPool pool{3};
  for (std::size_t bad = 0; bad < 300; ++bad) {
    std::atomic<std::size_t> done{0};
    bool is_caught = false;
    try {
      pool.for_ranges(300, 1, [&](std::size_t first, std::size_t) {
        if (first == bad) throw std::bad_alloc();
        ++done;
      });
    } catch (const std::bad_alloc&) {
      is_caught = true;
    }
    require(is_caught, "what work has thrown is lost");
    done = 0;
    pool.for_ranges(300, 7, [&](std::size_t first, std::size_t last) { done += last - first; });
    require(done == 300, "a pool does not serve on after work has thrown");
  }
}

}  // namespace

int main() {
  press_pool();
  throw_in_pool();
  check_products();
  check_attention();
  check_sampling();
  std::printf("ops_stress: ok\n");
}

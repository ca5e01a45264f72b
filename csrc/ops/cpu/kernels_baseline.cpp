#include <cstdint>
#include <cstring>

#include "ops/cpu/float_tiles.h"
#include "ops/cpu/linear_groups.h"
#include "ops/cpu/linear_panel.h"
#include "ops/cpu/multiply_add.h"
#include "ops/cpu/row_kernels.h"
#include "ops/cpu/sampling_loops.h"
#include "ops/cpu/vectors_baseline.h"
#include "ops/cpu/widen.h"

namespace aegaeon::ops {
namespace {

struct Plain : FloatTiles<PlainVectors> {
  static constexpr std::size_t kMaxRows = 3;
};

struct PlainGroups : Plain {
  using Floats = Vector;
  struct Integers {
    std::int32_t lanes[2 * kWidth];  // pairs
  };
  struct Sums {
    std::int32_t lanes[kWidth];
  };

  static Sums no_sum() { return Sums{}; }

  static Sums add(Sums a, const Sums& b) {
    for (std::size_t lane = 0; lane < kWidth; ++lane) a.lanes[lane] += b.lanes[lane];
    return a;
  }

  static Integers widen(const char* bytes) {
    std::int8_t narrow[2 * kWidth];
    std::memcpy(narrow, bytes, sizeof narrow);
    Integers pairs;
    for (std::size_t lane = 0; lane < 2 * kWidth; ++lane) pairs.lanes[lane] = narrow[lane];
    return pairs;
  }

  static Integers broadcast_pair(const std::uint32_t* pair) {
    std::int16_t both[2];
    std::memcpy(both, pair, sizeof both);
    Integers pairs;
    for (std::size_t lane = 0; lane < 2 * kWidth; ++lane) pairs.lanes[lane] = both[lane % 2];
    return pairs;
  }

  static Sums multiply_add(const Integers& weights, const Integers& pair, Sums sum) {
    for (std::size_t lane = 0; lane < kWidth; ++lane) {
      sum.lanes[lane] += weights.lanes[2 * lane] * pair.lanes[2 * lane] +
                         weights.lanes[2 * lane + 1] * pair.lanes[2 * lane + 1];
    }
    return sum;
  }

  static Floats to_floats(const Sums& sums) {
    float floats[kWidth];
    for (std::size_t lane = 0; lane < kWidth; ++lane) {
      floats[lane] = static_cast<float>(sums.lanes[lane]);
    }
    return load(floats);
  }

  static Floats scales(const char* bf16) {
    float floats[kWidth];
    for (std::size_t lane = 0; lane < kWidth; ++lane) {
      floats[lane] = widen_at<WeightType::bf16>(bf16, lane);
    }
    return load(floats);
  }

  static Floats broadcast_scale(const std::uint32_t* bits) {
    const float scale = float_of_bits(*bits);
    return broadcast(&scale);
  }

  static Floats multiply(Floats a, const Floats& b) {
    unroll<kParts>([&](auto i) { a.parts[i.at] *= b.parts[i.at]; });
    return a;
  }

  static Floats multiply_add_floats(const Floats& a, const Floats& b, const Floats& sum) {
    return Plain::multiply_add(a, b, sum);
  }
};

}  // namespace

PanelKernel baseline_kernel(WeightType type) {
  return type == WeightType::i8 ? group_kernel_of<PlainGroups>() : kernel_of<Plain>(type);
}

RowKernels baseline_rows() { return row_kernels_here(); }

SamplingKernel baseline_sampling() { return sampling_kernel(); }

std::size_t baseline_multiply_adds(std::size_t rounds) { return multiply_adds<Plain>(rounds); }

}  // namespace aegaeon::ops

#include <cstdint>
#include <cstring>

#include "ops/cpu/linear_groups.h"
#include "ops/cpu/linear_panel.h"
#include "ops/cpu/multiply_add.h"
#include "ops/cpu/row_kernels.h"
#include "ops/cpu/sampling_loops.h"
#include "ops/cpu/widen.h"

namespace aegaeon::ops {
namespace {

// Plain arrays, which any compiler turns into the vectors that every processor of the architecture
// has. Products and sums are rounded apart.
struct Plain {
  static constexpr std::size_t kWidth = 8;
  static constexpr std::size_t kMaxRows = 3;
  static constexpr std::size_t kSums = 2;
  struct Vector {
    float lanes[kWidth];
  };

  static Vector zero() { return Vector{}; }

  static Vector load(const float* from) {
    Vector vector;
    std::memcpy(vector.lanes, from, sizeof vector.lanes);
    return vector;
  }

  static void store(float* to, const Vector& vector) {
    std::memcpy(to, vector.lanes, sizeof vector.lanes);
  }

  static Vector broadcast(const float* from) {
    Vector vector;
    for (float& lane : vector.lanes) lane = *from;
    return vector;
  }

  static Vector multiply_add(const Vector& a, const Vector& b, const Vector& sum) {
    Vector result;
    for (std::size_t lane = 0; lane < kWidth; ++lane) {
      result.lanes[lane] = sum.lanes[lane] + a.lanes[lane] * b.lanes[lane];
    }
    return result;
  }

  using Weights = Vector;

  template <WeightType type>
  static constexpr std::size_t kWords = step_of(type).inputs;

  template <WeightType type>
  static Weights widen(const char* line, std::size_t vector, std::size_t word) {
    Vector weights;
    for (std::size_t lane = 0; lane < kWidth; ++lane) {
      weights.lanes[lane] = weight_at<type>(line, vector * kWidth + lane, word);
    }
    return weights;
  }
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
    Floats floats;
    for (std::size_t lane = 0; lane < kWidth; ++lane) {
      floats.lanes[lane] = static_cast<float>(sums.lanes[lane]);
    }
    return floats;
  }

  static Floats scales(const char* bf16) {
    Floats floats;
    for (std::size_t lane = 0; lane < kWidth; ++lane) {
      floats.lanes[lane] = widen_at<WeightType::bf16>(bf16, lane);
    }
    return floats;
  }

  static Floats broadcast_scale(const std::uint32_t* bits) {
    const float scale = float_of_bits(*bits);
    return broadcast(&scale);
  }

  static Floats multiply(const Floats& a, const Floats& b) {
    Floats product;
    for (std::size_t lane = 0; lane < kWidth; ++lane) {
      product.lanes[lane] = a.lanes[lane] * b.lanes[lane];
    }
    return product;
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

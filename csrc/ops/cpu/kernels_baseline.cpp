#include <cstring>

#include "ops/cpu/attention_tile.h"
#include "ops/cpu/linear_panel.h"
#include "ops/cpu/multiply_add.h"
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

  static Vector multiply(const Vector& a, const Vector& b) {
    Vector result;
    for (std::size_t lane = 0; lane < kWidth; ++lane) {
      result.lanes[lane] = a.lanes[lane] * b.lanes[lane];
    }
    return result;
  }

  static float multiply_add_one(float a, float b, float sum) { return sum + a * b; }

  static Vector multiply_add(const Vector& a, const Vector& b, const Vector& sum) {
    Vector result;
    for (std::size_t lane = 0; lane < kWidth; ++lane) {
      result.lanes[lane] = sum.lanes[lane] + a.lanes[lane] * b.lanes[lane];
    }
    return result;
  }

  template <WeightType type>
  static void widen_pair(const char* line, std::size_t pair, Vector& low, Vector& high) {
    for (std::size_t lane = 0; lane < kWidth; ++lane) {
      low.lanes[lane] = widen_at<type>(line, pair * 2 * kWidth + lane);
      high.lanes[lane] = widen_at<type>(line, pair * 2 * kWidth + kWidth + lane);
    }
  }

  template <WeightType type>
  static void finish(const float* sums, float* outputs) {
    std::memmove(outputs, sums, kTileOutputs * sizeof(float));
  }
};

}  // namespace

PanelKernel baseline_kernel(WeightType type) { return kernel_of<Plain>(type); }

AttentionKernel baseline_attention() { return {Plain::kMaxRows, attend_tile<Plain>}; }

SamplingKernel baseline_sampling() { return sampling_kernel(); }

std::size_t baseline_multiply_adds(std::size_t rounds) { return multiply_adds<Plain>(rounds); }

}  // namespace aegaeon::ops

#include "ops/cpu/attention_split.h"

namespace aegaeon::ops {
namespace {

// Plain arrays, which any compiler turns into the vectors that every processor of the architecture
// has. Products and sums are rounded apart.
struct Plain {
  static constexpr std::size_t kWidth = 8;
  static constexpr std::size_t kMaxQueries = 3;
  static constexpr std::size_t kFetchingQueries = 3;
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

  static float multiply_add_one(float a, float b, float sum) { return sum + a * b; }

  static Vector multiply_add(const Vector& a, const Vector& b, const Vector& sum) {
    Vector result;
    for (std::size_t lane = 0; lane < kWidth; ++lane) {
      result.lanes[lane] = sum.lanes[lane] + a.lanes[lane] * b.lanes[lane];
    }
    return result;
  }

  template <KvType type>
  static void load_pair(const char* from, Vector& low, Vector& high) {
    constexpr bool is_paired = type == KvType::bf16;
    for (std::size_t lane = 0; lane < kWidth; ++lane) {
      low.lanes[lane] = element<Plain, type>(from, is_paired ? 2 * lane : lane);
      high.lanes[lane] = element<Plain, type>(from, is_paired ? 2 * lane + 1 : lane + kWidth);
    }
  }

  static void interleave(Vector& low, Vector& high) {
    Vector both[2];
    for (std::size_t i = 0; i < 2 * kWidth; ++i) {
      both[i / kWidth].lanes[i % kWidth] = (i % 2 == 0 ? low : high).lanes[i / 2];
    }
    low = both[0];
    high = both[1];
  }
};

}  // namespace

AttentionKernel baseline_attention(KvType type) { return attention_of<Plain>(type); }

}  // namespace aegaeon::ops

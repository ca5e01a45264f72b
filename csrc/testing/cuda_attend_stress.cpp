// Attention kernels under the sanitizers, against the plain formula: `cuda_attend_stress`. Every
// operand is an allocation of its own, as large as it must be; what nobody wrote is no number.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "ops/cuda/attend_launch.h"
#include "testing/stress.h"

namespace {

using namespace aegaeon::ops;
using namespace aegaeon::testing;

constexpr std::size_t kHeads = 3, kWidth = 64, kLayers = 2;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// One sequence of one KV head, in blocks that lie in disorder.
template <typename T>
struct Sequence {
  std::size_t tokens;
  std::vector<std::size_t> blocks;
  std::vector<T> pages;
  std::vector<float> keys, values;

  explicit Sequence(std::size_t count)
      : tokens(count), keys(draw(count * kWidth)), values(draw(count * kWidth)) {
    const std::size_t needed = (count + kBlockTokens - 1) / kBlockTokens;
    for (std::size_t at = 0; at < needed; ++at) blocks.push_back((needed - 1 - at) * 2 * kLayers);
    pages.resize(needed * 2 * kLayers * kBlockTokens * kWidth);
    for (T& element : pages) cuda::narrow(kNan, element);
    for (std::size_t token = 0; token < count; ++token) {
      write(keys, token, 2);
      write(values, token, 3);
    }
  }

  void write(std::vector<float>& from, std::size_t token, std::size_t page) {
    const std::size_t row =
        (blocks[token / kBlockTokens] + page) * kBlockTokens + token % kBlockTokens;
    for (std::size_t i = 0; i < kWidth; ++i) {
      T& kept = pages[row * kWidth + i];
      cuda::narrow(from[token * kWidth + i], kept);
      from[token * kWidth + i] = cuda::widen(kept);
    }
  }

  // One element of what a query that sees `seen` tokens attends to.
  double expected(const float* query, std::size_t seen, double scale, std::size_t element) const {
    double sum = 0, total = 0;
    for (std::size_t token = 0; token < seen; ++token) {
      double score = 0;
      for (std::size_t i = 0; i < kWidth; ++i) {
        score += static_cast<double>(query[i]) * static_cast<double>(keys[token * kWidth + i]);
      }
      const double weight = std::exp(score * scale);
      total += weight;
      sum += weight * static_cast<double>(values[token * kWidth + element]);
    }
    return sum / total;
  }
};

// Attends with the last `rows` rows of a sequence of `tokens`.
template <typename T>
void attend(std::size_t tokens, std::size_t rows, double tolerance) {
  Sequence<T> sequence(tokens);
  const PagedKv kv = {
      sequence.pages.data(), 1, kWidth, {{0, rows, tokens - rows, sequence.blocks}}, KvType::f32};
  const cuda::StepTables made(kv, kHeads);
  const std::vector<float> queries = draw(rows * kHeads * kWidth);
  std::vector<float> out(queries.size(), kNan);
  std::vector<float> workspace(cuda::workspace_floats(made.bounds(), kv), kNan);
  const cuda::DeviceTables tables = {made.words().data(), made.bounds(), workspace.data()};
  constexpr float kScale = 0.1F;
  cuda::attend_as<T, kWidth>(nullptr, tables, {kv, 1, kHeads, queries.data(), kScale, out.data()});
  for (std::size_t at = 0; at < rows * kHeads; at += 7) {
    const float* const query = queries.data() + at * kWidth;
    const std::size_t seen = tokens - rows + at / kHeads + 1, element = at % kWidth;
    const double expected = sequence.expected(query, seen, 0.1, element);
    const double error = std::fabs(static_cast<double>(out[at * kWidth + element]) - expected);
    require(error <= tolerance, "query " + std::to_string(at) + " of " + std::to_string(tokens) +
                                    " tokens is off by " + std::to_string(error));
  }
  for (const float value : out) require(std::isfinite(value), "a result is not there");
}

}  // namespace

int main() {
  for (const std::uint64_t seed : {0, 1}) {
    aegaeon::emulation::schedule() = {seed, seed == 0};
    attend<cuda::Bf16>(530, 1, 2e-2);
    attend<cuda::Bf16>(545, 40, 2e-2);
    attend<float>(100, 1, 1e-5);
    attend<float>(70, 30, 1e-5);
  }
  std::puts("cuda_attend_stress: ok");
  return 0;
}

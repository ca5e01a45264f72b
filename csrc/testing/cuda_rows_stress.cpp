// Kernels of rows, blocks and sampling under the sanitizers, against plain formulas:
// `cuda_rows_stress`. Every operand is an allocation of its own, as large as it must be.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "ops/cuda/ops.h"
#include "ops/cuda/sampling.h"
#include "testing/emulation/block.h"
#include "testing/stress.h"

namespace {

using namespace aegaeon::ops;
using namespace aegaeon::testing;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

void norm(std::size_t features) {
  constexpr std::size_t kRows = 3;
  const std::vector<float> x = draw(kRows * features), weight = draw(features);
  std::vector<float> sum = draw(kRows * features), out(sum.size(), kNan);
  std::vector<float> added = sum;
  for (std::size_t at = 0; at < added.size(); ++at) added[at] += x[at];
  const RmsNormParams params = {{x.data(), features}, kRows, 1,          features,
                                weight.data(),        1e-5F, out.data(), nullptr};
  cuda::add_rms_norm(nullptr, {params, sum.data(), sum.data()});
  require(sum == added, "a residual is not added");
  for (std::size_t row = 0; row < kRows; ++row) {
    double squares = 0;
    for (std::size_t i = 0; i < features; ++i) {
      squares += std::pow(static_cast<double>(sum[row * features + i]), 2);
    }
    const double root = std::sqrt(squares / static_cast<double>(features) + 1e-5);
    for (std::size_t i = 0; i < features; ++i) {
      const double expected =
          static_cast<double>(sum[row * features + i]) / root * static_cast<double>(weight[i]);
      const double error = std::fabs(static_cast<double>(out[row * features + i]) - expected);
      require(error <= 1e-5, "a norm is off by " + std::to_string(error));
    }
  }
}

// Two rows at the end of one sequence, in its last block.
void append() {
  constexpr std::size_t kWidth = 64, kTokens = 32, kPage = kBlockTokens * kWidth;
  std::vector<float> pages(4 * kPage, kNan);
  const PagedKv kv = {pages.data(), 1, kWidth, {{0, 2, kTokens - 2, {0, 2}}}, KvType::f32};
  const cuda::StepTables made(kv, 1);
  const cuda::DeviceTables tables = {made.words().data(), made.bounds(), nullptr};
  const std::vector<float> keys = draw(2 * kWidth), values = draw(2 * kWidth);
  cuda::append_kv(nullptr, tables, {kv, 0, {keys.data(), kWidth}, {values.data(), kWidth}});
  for (std::size_t i = 0; i < 2 * kWidth; ++i) {
    require(pages[2 * kPage + 14 * kWidth + i] == keys[i], "a key is not where it belongs");
    require(pages[3 * kPage + 14 * kWidth + i] == values[i], "a value is not where it belongs");
  }
  const auto written = std::count_if(pages.begin(), pages.end(), [](float x) { return x == x; });
  require(written == 4 * static_cast<std::ptrdiff_t>(kWidth), "something else was written");
}

void copy_blocks() {
  constexpr std::size_t kPageFloats = 16 * 20, kBlockPages = 9;
  const std::vector<float> pages = draw(2 * kBlockPages * kPageFloats);
  std::vector<float> copied = pages, stage(pages.size(), kNan);
  const std::int32_t ids[] = {kBlockPages, 0};
  const cuda::CopyBlocksParams params = {
      copied.data(), kPageFloats * sizeof(float), kBlockPages, ids, 2, stage.data()};
  cuda::gather_blocks(nullptr, params);
  const auto half = static_cast<std::ptrdiff_t>(pages.size() / 2);
  require(std::equal(stage.begin(), stage.begin() + half, pages.begin() + half), "not gathered");
  std::fill(copied.begin(), copied.end(), kNan);
  cuda::scatter_blocks(nullptr, params);
  require(copied == pages, "not scattered");
}

// The formula of ops/sampling.h, by sorting.
std::int64_t expected_token(const std::vector<float>& logits, const Draw& draw) {
  std::vector<std::size_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), std::size_t{0});
  std::stable_sort(ids.begin(), ids.end(),
                   [&](std::size_t a, std::size_t b) { return logits[a] > logits[b]; });
  if (draw.temperature <= 0) return static_cast<std::int64_t>(ids[0]);
  const auto weight = [&](std::size_t id) {
    return std::exp(static_cast<double>(logits[id] - logits[ids[0]]) / draw.temperature);
  };
  if (draw.top_k > 0) {
    const float least = logits[ids[draw.top_k - 1]];
    while (logits[ids.back()] < least) ids.pop_back();
  }
  const auto add = [&](double sum, std::size_t id) { return sum + weight(id); };
  const double share = draw.top_p * std::accumulate(ids.begin(), ids.end(), 0.0, add);
  std::size_t kept = 1;
  for (double sum = weight(ids[0]); sum < share && kept < ids.size(); ++kept) {
    sum += weight(ids[kept]);
  }
  while (weight(ids[kept - 1]) < draw.min_p) --kept;
  ids.resize(kept);
  std::sort(ids.begin(), ids.end());
  const double height = uniform(draw.seed, draw.position);
  const double wanted = height * std::accumulate(ids.begin(), ids.end(), 0.0, add);
  double sum = 0;
  for (const std::size_t id : ids) {
    sum += weight(id);
    if (sum > wanted) return static_cast<std::int64_t>(id);
  }
  return static_cast<std::int64_t>(ids.back());
}

void sample() {
  constexpr std::size_t kVocab = 1100;
  std::vector<float> logits = draw(kVocab);
  // Many are ties.
  for (float& logit : logits) logit = std::round(logit * 40) / 20;
  const std::vector<Draw> draws = {{0, 0, 1, 0, 1, 2},        {1, 0, 1, 0, 1, 2},
                                   {0.7, 200, 1, 0, 1, 2},    {1, 0, 0.7, 0, 1, 2},
                                   {2, 900, 0.9, 0.01, 1, 2}, {1e9, 0, 0.5, 0, 1, 3}};
  std::vector<float> rows;
  std::vector<cuda::DeviceDraw> operands;
  for (const Draw& draw : draws) {
    rows.insert(rows.end(), logits.begin(), logits.end());
    operands.push_back(cuda::device_draw(draw));
  }
  std::vector<std::int64_t> tokens(draws.size(), -7);
  std::vector<double> workspace(cuda::sample_workspace_bytes(draws.size(), kVocab) / 8);
  cuda::sample(nullptr, {rows.data(), draws.size(), kVocab, operands.data(), tokens.data(),
                         workspace.data()});
  for (std::size_t at = 0; at < draws.size(); ++at) {
    const std::int64_t expected = expected_token(logits, draws[at]);
    require(tokens[at] == expected, "token " + std::to_string(tokens[at]) + " of draw " +
                                        std::to_string(at) + " is " + std::to_string(expected));
  }
}

}  // namespace

int main() {
  for (const std::uint64_t seed : {0, 1}) {
    aegaeon::emulation::schedule() = {seed, false};
    norm(64);
    norm(600);
    append();
    copy_blocks();
    sample();
  }
  std::puts("cuda_rows_stress: ok");
  return 0;
}

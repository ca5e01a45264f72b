// Recorded steps under the sanitizers: `step_stress`. Two threads replay one plan, each with a pool
// and a workspace of its own, for growing and shrinking passes.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "ops/cpu/step_plan.h"
#include "ops/cpu/thread_pool.h"
#include "ops/cpu/workspace.h"
#include "ops/ops.h"

namespace {

using namespace aegaeon::ops;

constexpr std::size_t kHeads = 3, kHeadDim = 10, kHidden = kHeads * kHeadDim, kLayers = 3;
constexpr std::size_t kVocab = 37, kMaxRows = 40;

void require(bool claim, const std::string& what) {
  if (!claim) {
    std::fprintf(stderr, "step_stress: %s\n", what.c_str());
    std::exit(1);
  }
}

std::vector<float> draw(std::size_t count, unsigned seed) {
  std::mt19937 random_bits{seed};
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random_bits);
  return values;
}

// A weight in tiles, 64-byte aligned.
class Weight {
 public:
  Weight(std::size_t outputs, std::size_t in_features, unsigned seed)
      : values_(draw((outputs + kTileOutputs - 1) / kTileOutputs * kTileOutputs * in_features + 16,
                     seed)),
        outputs_(outputs) {}

  BiasedMatrix part() const {
    const std::size_t off = reinterpret_cast<std::uintptr_t>(values_.data()) % 64;
    return {{values_.data() + (64 - off) % 64 / sizeof(float), outputs_, WeightType::f32}, nullptr};
  }

 private:
  std::vector<float> values_;
  std::size_t outputs_;
};

// Something like a decoder: layers of norms, products, attention and what is added.
struct Model {
  Weight qkv{3 * kHidden, kHidden, 1}, out{kHidden, kHidden, 2}, widened{2 * kHidden, kHidden, 3},
      head{kVocab, kHidden, 4};
  std::vector<float> norm = draw(kHidden, 5), head_norm = draw(kHeadDim, 6);
  StepPlan plan;

  Model() {
    Slot x = plan.input(kHidden);
    const View cos{plan.input(kHeadDim), 0, kHeadDim}, sin{plan.input(kHeadDim), 0, kHeadDim};
    for (std::size_t layer = 0; layer < kLayers; ++layer) {
      plan.need_stages(layer + 1);
      x = add_layer(layer, whole(x), cos, sin);
    }
    plan.need_stages(kLayers + 1);
    const Slot last = plan.rms_norm_outputs(whole(x), norm.data(), 1e-6F);
    plan.finish(plan.linear(whole(last), {head.part()}, nullptr));
  }

  static View whole(Slot slot) { return {slot, 0, kHidden}; }

  Slot add_layer(std::size_t layer, const View& x, const View& cos, const View& sin) {
    const Slot normed = plan.rms_norm(x, 1, norm.data(), 1e-6F);
    const Slot mixed = plan.linear(whole(normed), {qkv.part()}, nullptr);
    const View keys{mixed, kHidden, kHidden}, values{mixed, 2 * kHidden, kHidden};
    const Slot key = plan.rms_norm(keys, kHeads, head_norm.data(), 1e-6F);
    plan.append_kv(layer, kHeads, whole(plan.rotate(whole(key), kHeads, cos, sin)), values);
    const Slot query = plan.rotate({mixed, 0, kHidden}, kHeads, cos, sin);
    const Slot seen = plan.attend(layer, kHeads, whole(query), 0.3F);
    const Slot added = plan.linear(whole(seen), {out.part()}, &x);
    const Slot wide = plan.linear(whole(added), {widened.part()}, nullptr);
    return plan.rms_norm({wide, kHidden, kHidden}, kHeads, head_norm.data(), 1e-6F);
  }
};

// Rows 0 .. rows - 1 of one sequence; logits of the last `outputs`.
std::vector<float> replay(const Model& model, ThreadPool& pool, Workspace& workspace,
                          std::size_t rows, std::size_t outputs) {
  constexpr std::size_t kBlocks = (kMaxRows + kBlockTokens - 1) / kBlockTokens;
  const std::size_t block_pages = kLayers * 2 * kHeads;
  std::vector<float> pages(kBlocks * block_pages * kBlockTokens * kHeadDim, 0.5F);
  const PagedKv kv{
      pages.data(), kHeads, kHeadDim, {{0, rows, 0, {block_pages, 0, 2 * block_pages}}}};
  const std::vector<float> x = draw(rows * kHidden, 7), cos = draw(rows * kHeadDim, 8),
                           sin = draw(rows * kHeadDim, 9);
  std::vector<std::int64_t> wanted;
  for (std::size_t row = rows - outputs; row < rows; ++row) {
    wanted.push_back(static_cast<std::int64_t>(row));
  }
  std::vector<float> result(outputs * kVocab);
  const StepInputs given{
      rows, {x.data(), cos.data(), sin.data()}, outputs, wanted.data(), kv, result.data()};
  std::size_t at = 0, stages = 0;
  while ((at = model.plan.run(pool, workspace, given, at, stages)) < model.plan.operators()) {
    require(model.plan.stages_of(at) > stages, "a run stops for stages that are in");
    stages = model.plan.stages_of(at);
  }
  return result;
}

// What a pass gives does not depend on threads, company, or what the workspace was used for.
void work(const Model& model, const std::vector<float>& expected, unsigned threads, unsigned seed) {
  ThreadPool pool{threads};
  Workspace workspace;
  std::mt19937 choose{seed};
  for (int turn = 0; turn < 40; ++turn) {
    const std::size_t rows = choose() % kMaxRows + 1, outputs = choose() % (rows + 1);
    const std::vector<float> result = replay(model, pool, workspace, rows, outputs);
    const auto from = expected.begin() + static_cast<std::ptrdiff_t>((rows - outputs) * kVocab);
    require(std::equal(result.begin(), result.end(), from), "a replay has other bits");
  }
}

void refuse() {
  StepPlan plan;
  const View x{plan.input(4), 0, 4};
  bool is_refused = false;
  try {
    plan.rms_norm({x.slot, 1, 4}, 1, nullptr, 1e-6F);
  } catch (const std::invalid_argument&) {
    is_refused = true;
  }
  require(is_refused, "columns beyond a slot are not refused");
}

}  // namespace

int main() {
  const Model model;
  ThreadPool alone{1};
  Workspace workspace;
  const std::vector<float> expected = replay(model, alone, workspace, kMaxRows, kMaxRows);
  std::thread other([&] { work(model, expected, 3, 1); });
  work(model, expected, 2, 2);
  other.join();
  refuse();
  std::printf("step_stress: ok\n");
}

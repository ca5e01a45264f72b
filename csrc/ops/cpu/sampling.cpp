#include "ops/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "ops/cpu/kernel_choice.h"
#include "ops/cpu/sampling_kernel.h"
#include "ops/cpu/sampling_select.h"
#include "ops/cpu/thread_pool.h"
#include "ops/philox.h"

namespace aegaeon::ops {
namespace {

// What a thread needs for a row; kept, as large as it ever was (aegaeon/memory/workspace.py).
class RowSampler {
 public:
  // Looks over the row; false where a logit is infinite or NaN.
  bool read(const float* logits, std::size_t count);

  // Goes on with what `change` makes of the row that was read; false where nothing is left.
  bool change(const RowChange& change);
  std::size_t draw(const Draw& draw);
  // Writes the row's log-probabilities of params.chosen[at] and of the best.
  void log_probabilities(const LogProbParams& params, std::size_t at);

 private:
  std::size_t greedy() const;
  std::size_t draw_by_weight(const Draw& draw);
  void keep_allowed(const std::uint32_t* allowed);
  void choose_top(std::size_t top_k, double temperature);
  double weigh(double temperature);
  std::size_t find_height(double share, double floor) const;
  void find_best(std::size_t count);

  SamplingKernel kernel_ = sampling_kernels();
  const float* logits_ = nullptr;
  std::size_t count_ = 0;
  float high_ = 0;
  std::vector<float> highs_, scratch_, top_logits_;
  std::vector<std::uint32_t> top_ids_;
  std::vector<float> changed_;
  std::vector<std::uint32_t> allowed_ids_;
  bool is_masked_ = false;
  std::vector<double> weights_, sums_;
  Nucleus nucleus_;
};

bool RowSampler::read(const float* logits, std::size_t count) {
  kernel_ = sampling_kernels();
  is_masked_ = false;
  logits_ = logits;
  count_ = count;
  highs_.resize(blocks_of(count, kHighBlock));
  if (!kernel_.find_highs(logits, count, highs_.data())) return false;
  high_ = *std::max_element(highs_.begin(), highs_.end());
  return true;
}

bool RowSampler::change(const RowChange& change) {
  changed_.resize(std::max(changed_.size(), count_));
  std::copy_n(logits_, count_, changed_.begin());
  if (change.adjustment != nullptr) change.adjustment->apply(changed_.data(), count_);
  if (change.allowed != nullptr) keep_allowed(change.allowed);
  const bool is_masked = change.allowed != nullptr;
  if (count_ == 0 || !read(changed_.data(), count_)) return false;
  is_masked_ = is_masked;
  return true;
}

// Narrows the changed row to the tokens allowed, by id.
void RowSampler::keep_allowed(const std::uint32_t* allowed) {
  allowed_ids_.resize(std::max(allowed_ids_.size(), count_));
  std::size_t kept = 0;
  for (std::size_t word = 0; word * 32 < count_; ++word) {
    // Most words have none, or all.
    for (std::uint32_t bits = allowed[word]; bits != 0; bits &= bits - 1) {
      const std::size_t id = word * 32 + static_cast<std::size_t>(__builtin_ctz(bits));
      if (id >= count_) break;
      changed_[kept] = changed_[id];
      allowed_ids_[kept++] = static_cast<std::uint32_t>(id);
    }
  }
  count_ = kept;
}

std::size_t RowSampler::greedy() const {
  const auto block = std::find(highs_.begin(), highs_.end(), high_) - highs_.begin();
  const float* const first = logits_ + static_cast<std::size_t>(block) * kHighBlock;
  return static_cast<std::size_t>(std::find(first, logits_ + count_, high_) - logits_);
}

// Narrows the row to the k highest logits and their ties, by id.
void RowSampler::choose_top(std::size_t top_k, double temperature) {
  // Compared as weighed: what rounding makes equal is a tie.
  const auto scaled = [&](float logit) {
    return (static_cast<double>(logit) - static_cast<double>(high_)) / temperature;
  };
  const double least = scaled(kth_highest({logits_, count_, highs_}, top_k, scratch_));
  top_ids_.clear();
  top_logits_.clear();
  for (std::size_t block = 0; block < highs_.size(); ++block) {
    if (scaled(highs_[block]) < least) continue;
    const std::size_t end = std::min((block + 1) * kHighBlock, count_);
    for (std::size_t i = block * kHighBlock; i < end; ++i) {
      if (scaled(logits_[i]) < least) continue;
      top_ids_.push_back(static_cast<std::uint32_t>(i));
      top_logits_.push_back(logits_[i]);
    }
  }
  logits_ = top_logits_.data();
  count_ = top_logits_.size();
}

// Makes weights of the logits and returns their sum.
double RowSampler::weigh(double temperature) {
  if (weights_.size() < count_) weights_.resize(count_);
  sums_.resize(blocks_of(count_, kSumBlock));
  // Finite: with less, the highest would not weigh 1, and with this all others weigh nothing.
  const double coldness = std::min(1.0 / temperature, 1e300);
  double total = 0;
  for (std::size_t block = 0; block < sums_.size(); ++block) {
    const std::size_t first = block * kSumBlock, count = std::min(kSumBlock, count_ - first);
    kernel_.weigh(logits_ + first, count, high_, coldness, weights_.data() + first);
    kernel_.sum_blocks(weights_.data() + first, count, 0.0, &sums_[block]);
    total += sums_[block];
  }
  return total;
}

// The first index at which the sum of the weights of at least `floor`, whose blocks' sums are
// sums_, exceeds `share` of all of it.
std::size_t RowSampler::find_height(double share, double floor) const {
  double total = 0;
  for (const double sum : sums_) total += sum;
  const double wanted = share * total;
  double height = 0;
  std::size_t block = 0;
  while (block + 1 < sums_.size() && height + sums_[block] <= wanted) height += sums_[block++];
  const std::size_t end = std::min((block + 1) * kSumBlock, count_);
  for (std::size_t i = block * kSumBlock; i < end; ++i) {
    if (weights_[i] < floor) continue;
    height += weights_[i];
    if (height > wanted) return i;
  }
  // One by one they come to less than together, by a rounding: it is the last of them.
  std::size_t last = end - 1;
  while (last > 0 && weights_[last] < floor) --last;
  return last;
}

std::size_t RowSampler::draw(const Draw& draw) {
  const std::size_t index = draw.temperature > 0 ? draw_by_weight(draw) : greedy();
  return is_masked_ ? allowed_ids_[index] : index;
}

std::size_t RowSampler::draw_by_weight(const Draw& draw) {
  const bool is_narrowed = draw.top_k > 0 && draw.top_k < count_;
  if (is_narrowed) choose_top(draw.top_k, draw.temperature);
  const double total = weigh(draw.temperature);
  double floor = 0;
  if (draw.top_p < 1.0) {
    floor = nucleus_.cut(kernel_, weights_.data(), count_, draw.top_p * total);
  }
  // The heaviest has weight 1.
  if (draw.min_p > 0) floor = std::max(floor, std::min(draw.min_p, 1.0));
  if (floor > 0) kernel_.sum_blocks(weights_.data(), count_, floor, sums_.data());
  const std::size_t index = find_height(uniform(draw.seed, draw.position), floor);
  return is_narrowed ? top_ids_[index] : index;
}

// Makes top_ids_ the ids of the `count` highest logits, highest first.
void RowSampler::find_best(std::size_t count) {
  top_ids_.clear();
  if (count == 0) return;
  const float least = kth_highest({logits_, count_, highs_}, count, scratch_);
  const auto add = [&](auto is_wanted) {
    for (std::size_t block = 0; block < highs_.size(); ++block) {
      if (highs_[block] < least) continue;
      const std::size_t end = std::min((block + 1) * kHighBlock, count_);
      for (std::size_t i = block * kHighBlock; i < end && top_ids_.size() < count; ++i) {
        if (is_wanted(logits_[i])) top_ids_.push_back(static_cast<std::uint32_t>(i));
      }
    }
  };
  add([least](float logit) { return logit > least; });
  add([least](float logit) { return logit == least; });
  std::sort(top_ids_.begin(), top_ids_.end(), [this](std::uint32_t a, std::uint32_t b) {
    return logits_[a] > logits_[b] || (logits_[a] == logits_[b] && a < b);
  });
}

void RowSampler::log_probabilities(const LogProbParams& params, std::size_t at) {
  const double log_total = std::log(weigh(1.0));
  const auto value = [&](std::size_t id) {
    return (static_cast<double>(logits_[id]) - static_cast<double>(high_)) - log_total;
  };
  params.chosen_values[at] = value(params.chosen[at]);
  find_best(params.best_count);
  for (std::size_t i = 0; i < params.best_count; ++i) {
    params.best_ids[at * params.best_count + i] = top_ids_[i];
    params.best_values[at * params.best_count + i] = value(top_ids_[i]);
  }
}

RowSampler& this_threads_sampler() {
  thread_local RowSampler sampler;
  return sampler;
}

// Calls work(sampler, row) for every row.
template <typename Work>
void each_row(ThreadPool& pool, std::size_t rows, const Work& work) {
  pool.for_ranges(rows, 1, [&](std::size_t first, std::size_t last) {
    for (std::size_t row = first; row < last; ++row) work(this_threads_sampler(), row);
  });
}

}  // namespace

void sample(ThreadPool& pool, const SampleParams& params) {
  each_row(pool, params.rows, [&](RowSampler& sampler, std::size_t row) {
    const Draw& draw = params.draws[row];
    std::optional<std::size_t>& token = params.tokens[row];
    token.reset();
    if (!sampler.read(params.logits + row * params.vocab, params.vocab)) return;
    if (params.changes != nullptr && params.changes[row].is_any()) {
      if (!sampler.change(params.changes[row])) return;
    }
    token = sampler.draw(draw);
  });
}

void log_probabilities(ThreadPool& pool, const LogProbParams& params) {
  for (std::size_t row = 0; row < params.rows; ++row) {
    if (params.chosen[row] < params.vocab) continue;
    throw std::out_of_range("token id " + std::to_string(params.chosen[row]) +
                            " is outside the vocabulary of " + std::to_string(params.vocab));
  }
  each_row(pool, params.rows, [&](RowSampler& sampler, std::size_t row) {
    if (sampler.read(params.logits + row * params.vocab, params.vocab)) {
      sampler.log_probabilities(params, row);
      return;
    }
    constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
    params.chosen_values[row] = kNone;
    std::fill_n(params.best_ids + row * params.best_count, params.best_count, 0);
    std::fill_n(params.best_values + row * params.best_count, params.best_count, kNone);
  });
}

}  // namespace aegaeon::ops

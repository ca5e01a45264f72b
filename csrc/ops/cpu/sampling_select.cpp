#include "ops/cpu/sampling_select.h"

#include <algorithm>
#include <cstring>
#include <functional>

namespace aegaeon::ops {
namespace {

constexpr std::size_t kBins = 2048;
// So few are sorted.
constexpr std::size_t kSorted = 64;
// Bins of the first look: 64 to a halving of the weight. The last one has all that is lighter than
// 2^-32 of the heaviest, which is next to nothing of most sums.
constexpr unsigned kFirstShift = 46;

// Positive numbers are in the order of their bits.
std::uint64_t bits_of(double weight) {
  std::uint64_t bits;
  std::memcpy(&bits, &weight, sizeof bits);
  return bits;
}

double of_bits(std::uint64_t bits) {
  double weight;
  std::memcpy(&weight, &bits, sizeof weight);
  return weight;
}

std::size_t bin_of(std::uint64_t bits, std::uint64_t high, unsigned shift) {
  return std::min<std::size_t>((high - bits) >> shift, kBins - 1);
}

}  // namespace

float kth_highest(const HighRow& row, std::size_t k, std::vector<float>& scratch) {
  const auto place = [&] { return scratch.begin() + static_cast<std::ptrdiff_t>(k - 1); };
  const auto kth = [&] {
    std::nth_element(scratch.begin(), place(), scratch.end(), std::greater<float>());
    return *place();
  };
  if (k > row.highs.size()) {
    scratch.assign(row.logits, row.logits + row.count);
    return kth();
  }
  // As many blocks have a logit this high, so the k-th is no lower.
  scratch = row.highs;
  const float bound = kth();
  scratch.clear();
  for (std::size_t block = 0; block < row.highs.size(); ++block) {
    if (row.highs[block] < bound) continue;
    const std::size_t end = std::min((block + 1) * kHighBlock, row.count);
    for (std::size_t i = block * kHighBlock; i < end; ++i) {
      if (row.logits[i] >= bound) scratch.push_back(row.logits[i]);
    }
  }
  return kth();
}

// Finds the bin in which the sum reaches `wanted`; above_ becomes the sum of those before.
bool Nucleus::find_bin(double wanted, std::size_t& bin) {
  for (bin = 0; bin < kBins; ++bin) {
    const double sum = above_ + bins_[bin];
    if (sum >= wanted && bins_[bin] > 0) return true;
    above_ = sum;
  }
  return false;
}

// Takes of what is found, one by one, until the sum reaches `wanted`.
double Nucleus::walk(double* weights, double wanted) {
  const auto end = found_.begin() + static_cast<std::ptrdiff_t>(length_);
  auto last = found_.begin();
  for (double sum = above_ + weights[*last]; sum < wanted && last + 1 != end;) {
    sum += weights[*++last];
  }
  const double least = weights[*last];
  for (auto tie = last + 1; tie != end && weights[*tie] == least; ++tie) weights[*tie] = 0.0;
  return least;
}

// The first look, at all weights: leaves what is in the bin where the sum reaches `wanted`.
bool Nucleus::look(const SamplingKernel& kernel, const double* weights, std::size_t count,
                   double wanted) {
  // Neighbours go to bins of their own: to add to what was just written takes longer.
  bins_.assign(2 * kBins, 0.0);
  const std::uint64_t high = bits_of(1.0);
  const auto add = [&](std::size_t i, double* bins) {
    bins[bin_of(bits_of(weights[i]), high, kFirstShift)] += weights[i];
  };
  for (std::size_t i = 0; i + 1 < count; i += 2) {
    add(i, bins_.data());
    add(i + 1, bins_.data() + kBins);
  }
  if (count % 2 != 0) add(count - 1, bins_.data());
  for (std::size_t at = 0; at < kBins; ++at) bins_[at] += bins_[kBins + at];
  above_ = 0;
  std::size_t bin;
  if (!find_bin(wanted, bin)) return false;
  const std::uint64_t most = high - (std::uint64_t{bin} << kFirstShift);
  const std::uint64_t least = most + 1 - (std::uint64_t{1} << kFirstShift);
  if (found_.size() < count) found_.resize(count);
  length_ = kernel.find_between(weights, count, bin == kBins - 1 ? 0.0 : of_bits(least),
                                of_bits(most), found_.data());
  return true;
}

// Looks closer, at what was found: from `least` to `most`, which are among them.
bool Nucleus::look_closer(const double* weights, double wanted, double least, double most) {
  const std::uint64_t high = bits_of(most), range = high - bits_of(least);
  unsigned shift = 0;
  while (range >> shift >= kBins) ++shift;
  bins_.assign(kBins, 0.0);
  const auto bin_at = [&](std::size_t at) {
    return bin_of(bits_of(weights[found_[at]]), high, shift);
  };
  for (std::size_t at = 0; at < length_; ++at) bins_[bin_at(at)] += weights[found_[at]];
  std::size_t bin;
  if (!find_bin(wanted, bin)) return false;
  std::size_t kept = 0;
  for (std::size_t at = 0; at < length_; ++at) {
    if (bin_at(at) == bin) found_[kept++] = found_[at];
  }
  length_ = kept;
  return true;
}

double Nucleus::cut(const SamplingKernel& kernel, double* weights, std::size_t count,
                    double wanted) {
  if (!look(kernel, weights, count, wanted)) return 0.0;
  const auto lighter = [&](std::uint32_t a, std::uint32_t b) { return weights[a] < weights[b]; };
  const auto first = [&](std::uint32_t a, std::uint32_t b) {
    return weights[a] > weights[b] || (weights[a] == weights[b] && a < b);
  };
  for (;;) {
    const auto end = found_.begin() + static_cast<std::ptrdiff_t>(length_);
    const auto [lightest, heaviest] = std::minmax_element(found_.begin(), end, lighter);
    const double least = weights[*lightest], most = weights[*heaviest];
    if (least == most) return walk(weights, wanted);
    if (length_ <= kSorted) {
      std::sort(found_.begin(), end, first);
      return walk(weights, wanted);
    }
    // Added up in another order, they may fall short by a rounding: then all of them are needed.
    if (!look_closer(weights, wanted, least, most)) return least;
  }
}

}  // namespace aegaeon::ops

#include "memory/eviction.h"

#include <algorithm>
#include <cmath>

namespace aegaeon::memory {

double decayed_uses(double uses, double age_s) {
  return uses * std::exp2(-std::max(age_s, 0.0) / kUseHalfLife_s);
}

// A steady rate r makes the decayed count r * half-life / ln 2.
double Candidate::value() const { return reload_s * (uses * std::log(2.0) + demands); }

std::optional<std::vector<Candidate>> choose_victims(std::vector<Candidate> candidates,
                                                     std::uint64_t need_bytes,
                                                     std::size_t need_slots) {
  const auto density = [](const Candidate& one) {
    return one.value() / static_cast<double>(one.bytes);
  };
  std::sort(candidates.begin(), candidates.end(), [&](const Candidate& a, const Candidate& b) {
    const double first = density(a), second = density(b);
    return first != second ? first < second : a.idle_s > b.idle_s;
  });
  std::uint64_t bytes = 0;
  std::size_t count = 0;
  for (; count < candidates.size() && (bytes < need_bytes || count < need_slots); ++count) {
    bytes += candidates[count].bytes;
  }
  if (bytes < need_bytes || count < need_slots) {
    return std::nullopt;
  }
  candidates.resize(count);
  // The dearest first, for what is not needed should be what is worth most.
  for (std::size_t at = candidates.size(); at-- > 0;) {
    if (bytes - candidates[at].bytes >= need_bytes && candidates.size() > need_slots) {
      bytes -= candidates[at].bytes;
      candidates.erase(candidates.begin() + static_cast<std::ptrdiff_t>(at));
    }
  }
  return candidates;
}

}  // namespace aegaeon::memory

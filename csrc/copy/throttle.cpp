#include "copy/throttle.h"

#include <algorithm>

namespace aegaeon::copy {

Slot Link::grant(std::int64_t ready_ns, std::int64_t now_ns, std::size_t bytes) {
  if (!is_limited()) {
    return {now_ns, now_ns};
  }
  const std::int64_t start = std::max({free_at_, ready_ns, now_ns - kCatchUpNs});
  const double took_ns =
      static_cast<double>(bytes) * 1e9 / static_cast<double>(bytes_per_s_) + rest_ns_;
  const auto whole_ns = static_cast<std::int64_t>(took_ns);
  rest_ns_ = took_ns - static_cast<double>(whole_ns);
  free_at_ = start + whole_ns;
  return {start, free_at_};
}

}  // namespace aegaeon::copy

// How many rows are cut into what fits registers.
#pragma once

#include <algorithm>
#include <cstddef>

namespace aegaeon::ops {

// Rows shared out to as few panels as possible, all of nearly the same size.
class Panels {
 public:
  Panels(std::size_t rows, std::size_t max_rows)
      : count_((rows + max_rows - 1) / max_rows), base_(rows / count_), longer_(rows % count_) {}

  std::size_t count() const { return count_; }
  std::size_t first_row(std::size_t panel) const {
    return panel * base_ + std::min(panel, longer_);
  }
  std::size_t rows(std::size_t panel) const { return base_ + (panel < longer_ ? 1 : 0); }

 private:
  std::size_t count_, base_, longer_;
};

}  // namespace aegaeon::ops

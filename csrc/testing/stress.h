// What programs that hold operators against plain formulas begin with.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace aegaeon::testing {

// Ends the program where `claim` does not hold, and says so under its name.
inline void require(bool claim, const std::string& what) {
  if (!claim) {
    std::fprintf(stderr, "%s: %s\n", program_invocation_short_name, what.c_str());
    std::exit(1);
  }
}

inline std::mt19937 random_bits{7};

inline std::vector<float> draw(std::size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random_bits);
  return values;
}

}  // namespace aegaeon::testing

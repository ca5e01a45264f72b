// Which instructions the operators use: the best this processor has, or what a test asks for.
#pragma once

#include <string>

namespace aegaeon::ops {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

// The one in use.
Isa current_isa();

// Uses `name` from now on: "baseline", "avx2", "avx512" or "best". Throws std::invalid_argument for
// other names and for what this processor lacks. Results of the first differ in their last bits.
void force_isa(const std::string& name);

const char* isa_name(Isa isa);

}  // namespace aegaeon::ops

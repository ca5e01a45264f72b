// Which instructions the operators use: the best this processor has, or what a test asks for.
#pragma once

#include <string>

namespace aegaeon::ops {

// Of operators on floats.
enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };
// Of products of integers, whose instructions came one by one: for the level avx512 they are those
// that the processor has of AVX2 and AVX-512BW.
enum class IntegerIsa { baseline = 0, avx2 = 1, avx512bw = 2, avx512_vnni = 3 };

// Those in use.
Isa current_isa();
IntegerIsa current_integer_isa();
// Whether there are instructions for products of bf16.
bool has_bf16_products();

// Uses the level `name` from now on: "baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16" or
// "best". Throws std::invalid_argument for other names and for what this processor lacks. Results
// of the first differ in their last bits.
void force_isa(const std::string& name);

// The name of the level in use.
const char* isa_name();

}  // namespace aegaeon::ops

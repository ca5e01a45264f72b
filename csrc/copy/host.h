// Copies between places in host memory.
#pragma once

#include <cstddef>

namespace aegaeon::copy {

// From here on a copy goes around the cache: it would push out more than it is worth there, and
// lines that are overwritten whole need not be read first.
constexpr std::size_t kStreamBytes = std::size_t{1} << 20;

// Copies by memcpy; the ranges must not overlap.
void copy_cached(void* to, const void* from, std::size_t bytes);

// Copies by stores that bypass the cache, the widest that the processor has, and fences them: who
// sees what this thread writes afterwards sees the bytes. The ranges must not overlap.
void copy_streaming(void* to, const void* from, std::size_t bytes);

// The same with a given instruction set, for tests: "avx512", "avx2", "sse2" or "none" (memcpy).
// False, and nothing is copied, where this processor has no such instructions.
bool copy_streaming_with(const char* instructions, void* to, const void* from, std::size_t bytes);

}  // namespace aegaeon::copy

// What this process has mapped, as the system tells it.
#pragma once

#include <cstddef>

namespace cudart {

// Whether all pages of the bytes are mapped, to be written too where `is_written`.
bool are_mapped(const void* base, std::size_t bytes, bool is_written);

}  // namespace cudart

// Recording of streams into graphs: what a thread that records may not do.
#pragma once

#include <cstddef>

namespace cudart {

// Whether the calling thread records, and so may neither wait nor allocate: what it records is void
// then.
bool spoils_recording();

// Graphs, recorded or to be launched, that have not been given back.
std::size_t graph_count();

}  // namespace cudart

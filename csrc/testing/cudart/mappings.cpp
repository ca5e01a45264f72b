#include "testing/cudart/mappings.h"

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>

namespace cudart {

bool are_mapped(const void* base, std::size_t bytes, bool is_written) {
  auto at = reinterpret_cast<std::uintptr_t>(base);
  const std::uintptr_t end = at + bytes;
  std::ifstream maps("/proc/self/maps");
  // In the order of addresses.
  for (std::string line; at < end && std::getline(maps, line);) {
    std::uintptr_t first = 0;
    std::uintptr_t behind = 0;
    char modes[5] = {};
    if (std::sscanf(line.c_str(), "%lx-%lx %4s", &first, &behind, modes) != 3) return false;
    if (behind <= at) continue;
    if (first > at || modes[0] != 'r' || (is_written && modes[1] != 'w')) return false;
    at = behind;
  }
  return at >= end;
}

}  // namespace cudart

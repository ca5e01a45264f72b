// Seconds of Python as nanoseconds, and waits that a signal handler may end.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "shm/futex.h"
#include "shm/ring.h"

namespace aegaeon {

// Negative becomes 0; so long that nobody sees the end becomes 30 years.
inline std::int64_t to_ns(double seconds) {
  constexpr double kLongest = 1e9;
  if (std::isnan(seconds)) {
    throw pybind11::value_error("a time in seconds must not be nan");
  }
  return static_cast<std::int64_t>(std::clamp(seconds, 0.0, kLongest) * 1e9);
}

// Runs `wait(chunk_ns)` without the GIL, then Python's signal handlers, which may raise.
template <typename Wait>
void wait_chunk(std::int64_t left_ns, const Wait& wait) {
  {
    const pybind11::gil_scoped_release released;
    wait(std::min(left_ns, shm::kWaitChunk));
  }
  if (PyErr_CheckSignals() != 0) {
    throw pybind11::error_already_set();
  }
}

}  // namespace aegaeon

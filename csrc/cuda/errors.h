// Needs no CUDA: also a build without it has this to say.
#pragma once

#include <stdexcept>

namespace aegaeon::cuda {

// A device that is not there, or a call of it that failed; becomes DeviceError in aegaeon.errors.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A device that answers this process with failures alone from here on, until the process ends;
// becomes DeviceLost.
struct Lost : Error {
  using Error::Error;
};

}  // namespace aegaeon::cuda

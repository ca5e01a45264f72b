// The failures of copies; but for the last, each becomes the class of the same name in
// aegaeon.errors.
#pragma once

#include <stdexcept>

namespace aegaeon::copy {

struct CopyError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct CopyQueueFull : CopyError {
  using CopyError::CopyError;
};
// The device behind the link is lost: no copy will be made any more. Becomes DeviceLost.
struct LinkLost : CopyError {
  using CopyError::CopyError;
};

}  // namespace aegaeon::copy

// The failures of copies; each becomes the class of the same name in aegaeon.errors.
#pragma once

#include <stdexcept>

namespace aegaeon::copy {

struct CopyError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct CopyQueueFull : CopyError {
  using CopyError::CopyError;
};

}  // namespace aegaeon::copy

// The failures of the weight cache; each becomes the class of the same name in aegaeon.errors.
#pragma once

#include <stdexcept>

namespace aegaeon::memory {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct CheckpointError : Error {
  using Error::Error;
};
struct MemoryFull : Error {
  using Error::Error;
};
struct BudgetTooSmall : Error {
  using Error::Error;
};
struct WeightsEvicted : Error {
  using Error::Error;
};
struct LoadCancelled : Error {
  using Error::Error;
};

}  // namespace aegaeon::memory

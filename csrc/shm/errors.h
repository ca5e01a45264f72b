// The failures of shared memory; each becomes the class of the same name in aegaeon.errors.
#pragma once

#include <stdexcept>
#include <string>

namespace aegaeon::shm {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct RegionError : Error {
  using Error::Error;
};
struct RegionMismatch : RegionError {
  using RegionError::RegionError;
};
struct RingFull : Error {
  using Error::Error;
};
struct RingClosed : Error {
  using Error::Error;
};
struct RecordTooLarge : Error {
  using Error::Error;
};
struct TableFull : Error {
  using Error::Error;
};
struct StaleIncarnation : Error {
  using Error::Error;
};
struct OutOfBlocks : Error {
  using Error::Error;
};

}  // namespace aegaeon::shm

// Which failures of a call are the device's last word to this process.
#pragma once

#include <driver_types.h>

namespace aegaeon::cuda {

// Those of which the runtime's reference says that the process must be terminated, and those after
// which the hardware has stopped the context or the context is gone.
inline bool is_sticky(cudaError_t error) {
  constexpr int kContained = 226;  // names that older toolkits do not know
  constexpr int kTensorMemoryLeak = 721;
  const int code = static_cast<int>(error);
  if (code == kContained || code == kTensorMemoryLeak) return true;
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorMpsClientTerminated:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorContextIsDestroyed:
    case cudaErrorExternalDevice:
    case cudaErrorUnknown:  // of an internal error, which nothing has been seen to come back from
      return true;
    default:
      return false;
  }
}

}  // namespace aegaeon::cuda

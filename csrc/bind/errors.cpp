#include "bind/errors.h"

// Not pybind11.h, which takes ten seconds to compile: the plain interface is all this needs.
#include <Python.h>

#include "copy/errors.h"
#include "cuda/errors.h"
#include "memory/errors.h"
#include "shm/errors.h"

namespace aegaeon {
namespace {

// Python's classes, kept for the life of the process: a translator may run at any time in it.
struct Classes {
  PyObject* region_error;
  PyObject* region_mismatch;
  PyObject* ring_full;
  PyObject* ring_closed;
  PyObject* record_too_large;
  PyObject* table_full;
  PyObject* stale_incarnation;
  PyObject* checkpoint_error;
  PyObject* memory_full;
  PyObject* budget_too_small;
  PyObject* weights_evicted;
  PyObject* load_cancelled;
  PyObject* copy_error;
  PyObject* copy_queue_full;
  PyObject* out_of_blocks;
  PyObject* device_error;
  PyObject* device_lost;
};

Classes classes;

}  // namespace

bool find_error_classes() {
  PyObject* errors = PyImport_ImportModule("aegaeon.errors");
  if (errors == nullptr) {
    return false;
  }
  const auto find = [errors](const char* name, PyObject*& place) {
    place = PyObject_GetAttrString(errors, name);
    return place != nullptr;
  };
  const bool found =
      find("RegionError", classes.region_error) &&
      find("RegionMismatch", classes.region_mismatch) && find("RingFull", classes.ring_full) &&
      find("RingClosed", classes.ring_closed) && find("RecordTooLarge", classes.record_too_large) &&
      find("TableFull", classes.table_full) &&
      find("StaleIncarnation", classes.stale_incarnation) &&
      find("CheckpointError", classes.checkpoint_error) &&
      find("MemoryFull", classes.memory_full) && find("BudgetTooSmall", classes.budget_too_small) &&
      find("WeightsEvicted", classes.weights_evicted) &&
      find("LoadCancelled", classes.load_cancelled) && find("CopyError", classes.copy_error) &&
      find("CopyQueueFull", classes.copy_queue_full) &&
      find("OutOfBlocks", classes.out_of_blocks) && find("DeviceError", classes.device_error) &&
      find("DeviceLost", classes.device_lost);
  Py_DECREF(errors);
  return found;
}

// Whether `error` is an Error, or one of its kinds: then Python has it as `kind`.
template <typename Error>
bool is_of(const std::exception& error, PyObject* kind) {
  if (dynamic_cast<const Error*>(&error) == nullptr) return false;
  PyErr_SetString(kind, error.what());
  return true;
}

void translate_error(std::exception_ptr failure) {
  try {
    std::rethrow_exception(failure);
  } catch (const std::exception& error) {
    const bool is_ours =  // kinds before what they are kinds of
        is_of<shm::RegionMismatch>(error, classes.region_mismatch) ||
        is_of<shm::RegionError>(error, classes.region_error) ||
        is_of<shm::RingFull>(error, classes.ring_full) ||
        is_of<shm::RingClosed>(error, classes.ring_closed) ||
        is_of<shm::RecordTooLarge>(error, classes.record_too_large) ||
        is_of<shm::TableFull>(error, classes.table_full) ||
        is_of<shm::StaleIncarnation>(error, classes.stale_incarnation) ||
        is_of<memory::CheckpointError>(error, classes.checkpoint_error) ||
        is_of<memory::MemoryFull>(error, classes.memory_full) ||
        is_of<memory::BudgetTooSmall>(error, classes.budget_too_small) ||
        is_of<memory::WeightsEvicted>(error, classes.weights_evicted) ||
        is_of<memory::LoadCancelled>(error, classes.load_cancelled) ||
        is_of<copy::CopyQueueFull>(error, classes.copy_queue_full) ||
        is_of<copy::LinkLost>(error, classes.device_lost) ||
        is_of<copy::CopyError>(error, classes.copy_error) ||
        is_of<shm::OutOfBlocks>(error, classes.out_of_blocks) ||
        is_of<cuda::Lost>(error, classes.device_lost) ||
        is_of<cuda::Error>(error, classes.device_error);
    if (!is_ours) throw;
  }
}

}  // namespace aegaeon

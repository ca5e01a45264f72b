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

void translate_error(std::exception_ptr failure) {
  try {
    std::rethrow_exception(failure);
  } catch (const shm::RegionMismatch& error) {
    PyErr_SetString(classes.region_mismatch, error.what());
  } catch (const shm::RegionError& error) {
    PyErr_SetString(classes.region_error, error.what());
  } catch (const shm::RingFull& error) {
    PyErr_SetString(classes.ring_full, error.what());
  } catch (const shm::RingClosed& error) {
    PyErr_SetString(classes.ring_closed, error.what());
  } catch (const shm::RecordTooLarge& error) {
    PyErr_SetString(classes.record_too_large, error.what());
  } catch (const shm::TableFull& error) {
    PyErr_SetString(classes.table_full, error.what());
  } catch (const shm::StaleIncarnation& error) {
    PyErr_SetString(classes.stale_incarnation, error.what());
  } catch (const memory::CheckpointError& error) {
    PyErr_SetString(classes.checkpoint_error, error.what());
  } catch (const memory::MemoryFull& error) {
    PyErr_SetString(classes.memory_full, error.what());
  } catch (const memory::BudgetTooSmall& error) {
    PyErr_SetString(classes.budget_too_small, error.what());
  } catch (const memory::WeightsEvicted& error) {
    PyErr_SetString(classes.weights_evicted, error.what());
  } catch (const memory::LoadCancelled& error) {
    PyErr_SetString(classes.load_cancelled, error.what());
  } catch (const copy::CopyQueueFull& error) {
    PyErr_SetString(classes.copy_queue_full, error.what());
  } catch (const copy::LinkLost& error) {
    PyErr_SetString(classes.device_lost, error.what());
  } catch (const copy::CopyError& error) {
    PyErr_SetString(classes.copy_error, error.what());
  } catch (const shm::OutOfBlocks& error) {
    PyErr_SetString(classes.out_of_blocks, error.what());
  } catch (const cuda::Lost& error) {
    PyErr_SetString(classes.device_lost, error.what());
  } catch (const cuda::Error& error) {
    PyErr_SetString(classes.device_error, error.what());
  }
}

}  // namespace aegaeon

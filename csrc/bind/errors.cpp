#include "bind/errors.h"

#include <pybind11/pybind11.h>

#include "shm/errors.h"

namespace py = pybind11;

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
};

Classes classes;

void translate(std::exception_ptr failure) {
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
  }
}

}  // namespace

void bind_errors() {
  const py::module_ errors = py::module_::import("aegaeon.errors");
  const auto find = [&errors](const char* name) {
    return py::object(errors.attr(name)).release().ptr();
  };
  classes = {find("RegionError"),     find("RegionMismatch"), find("RingFull"),
             find("RingClosed"),      find("RecordTooLarge"), find("TableFull"),
             find("StaleIncarnation")};
  py::register_local_exception_translator(&translate);
}

}  // namespace aegaeon

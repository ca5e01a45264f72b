#include "bind/table.h"

#include <atomic>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "bind/time.h"
#include "shm/errors.h"
#include "shm/table.h"

namespace py = pybind11;

namespace aegaeon {
namespace {

std::string_view view(const py::bytes& bytes) {
  return {PyBytes_AS_STRING(bytes.ptr()), static_cast<std::size_t>(PyBytes_GET_SIZE(bytes.ptr()))};
}

// A table that may be closed while other threads are in it: it stays mapped until nobody holds it.
class PyTable {
 public:
  explicit PyTable(shm::Table table) : table_(std::move(table)) {}

  void put(const py::bytes& key, const py::bytes& value, double lease_s, std::uint64_t fence) {
    write(key, value, {to_ns(lease_s), fence, shm::PutMode::put});
  }

  void renew(const py::bytes& key, const py::bytes& value, double lease_s, std::uint64_t fence) {
    write(key, value, {to_ns(lease_s), fence, shm::PutMode::renew});
  }

  void put_evicting(const py::bytes& key, const py::bytes& value, double lease_s) {
    write(key, value, {to_ns(lease_s), 0, shm::PutMode::evict});
  }

  py::object get(const py::bytes& key) const {
    check_open();
    const auto value = table_.get(view(key));
    return value ? py::object(py::bytes(*value)) : py::none();
  }

  bool remove(const py::bytes& key, std::uint64_t fence) {
    bool removed = false;
    locked(key, [&](std::int64_t patience) {
      return table_.remove(view(key), fence, patience, removed);
    });
    return removed;
  }

  py::list items() const {
    check_open();
    const auto found = [this] {
      const py::gil_scoped_release released;
      return table_.items();
    }();
    py::list pairs(found.size());
    for (std::size_t at = 0; at < found.size(); ++at) {
      pairs[at] = py::make_tuple(py::bytes(found[at].first), py::bytes(found[at].second));
    }
    return pairs;
  }

  void close() { closed_.store(true); }
  std::size_t slots() const { return table_.slots(); }
  std::size_t slot_bytes() const { return table_.slot_bytes(); }

 private:
  void check_open() const {
    if (closed_.load(std::memory_order_relaxed)) {
      throw shm::RegionError("this table, " + table_.path() + ", has been closed");
    }
  }

  void write(const py::bytes& key, const py::bytes& value, const shm::PutOptions& options) {
    locked(key, [&](std::int64_t patience) {
      return table_.put(view(key), view(value), options, patience);
    });
  }

  // Tries with the GIL, which costs less than giving it away; waits without.
  template <typename Write>
  void locked(const py::bytes& key, const Write& write) {
    check_open();
    if (write(0)) {
      return;
    }
    const py::gil_scoped_release released;
    if (!write(shm::kLockPatience)) {
      throw shm::RegionError("pid " + std::to_string(table_.lock_holder_pid(view(key))) +
                             " has been writing to " + table_.path() +
                             " for seconds; is it stopped? continue or kill it");
    }
  }

  shm::Table table_;
  std::atomic<bool> closed_{false};
};

std::unique_ptr<PyTable> wrap(shm::Table table) {
  return std::make_unique<PyTable>(std::move(table));
}

}  // namespace

void bind_table(py::module_& module) {
  py::class_<PyTable>(module, "Table")
      .def_static(
          "create",
          [](const std::string& path, std::size_t slots, std::size_t slot_bytes) {
            return wrap(shm::Table::create(path, slots, slot_bytes));
          },
          py::arg("path"), py::arg("slots"), py::arg("slot_bytes"))
      .def_static(
          "attach", [](const std::string& path) { return wrap(shm::Table::attach(path)); },
          py::arg("path"))
      .def_static(
          "open_or_create",
          [](const std::string& path, std::size_t slots, std::size_t slot_bytes) {
            return wrap(shm::Table::open_or_create(path, slots, slot_bytes));
          },
          py::arg("path"), py::arg("slots"), py::arg("slot_bytes"))
      .def("put", &PyTable::put, py::arg("key"), py::arg("value"), py::arg("lease_s"),
           py::arg("fence") = 0)
      .def("renew", &PyTable::renew, py::arg("key"), py::arg("value"), py::arg("lease_s"),
           py::arg("fence"))
      .def("put_evicting", &PyTable::put_evicting, py::arg("key"), py::arg("value"),
           py::arg("lease_s"))
      .def("get", &PyTable::get, py::arg("key"))
      .def("remove", &PyTable::remove, py::arg("key"), py::arg("fence"))
      .def("items", &PyTable::items)
      .def("close", &PyTable::close)
      .def_property_readonly("slots", &PyTable::slots)
      .def_property_readonly("slot_bytes", &PyTable::slot_bytes);
}

}  // namespace aegaeon

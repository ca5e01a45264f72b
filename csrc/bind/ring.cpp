#include "bind/ring.h"

#include <atomic>
#include <memory>
#include <string>
#include <utility>

#include "bind/time.h"
#include "shm/errors.h"
#include "shm/ring.h"

namespace py = pybind11;

namespace aegaeon {
namespace {

// Copies from here on are made without the GIL.
constexpr std::size_t kLongCopyBytes = 64 << 10;
// One receive() hands out about this much at most, so that the allocator reuses memory that is
// mapped and in the cache: ten times as fast with long records as taking a whole ring at once.
constexpr std::size_t kBatchBytes = 256 << 10;

// A ring and what Python adds to it: it may be closed while another thread waits in it, so the
// memory stays mapped until nobody holds the object.
class PyRing {
 public:
  explicit PyRing(shm::Ring ring) : ring_(std::move(ring)) {}

  void send(const py::bytes& record, double timeout_s) {
    check_open();
    const char* payload = PyBytes_AS_STRING(record.ptr());
    const auto bytes = static_cast<std::size_t>(PyBytes_GET_SIZE(record.ptr()));
    if (bytes >= kLongCopyBytes || ring_.send(payload, bytes, 0) != shm::Sent::committed) {
      send_slowly(payload, bytes, to_ns(timeout_s));
    }
  }

  py::list receive(double timeout_s, py::ssize_t max_records) {
    check_open();
    const ReaderTurn turn(*this);
    const std::int64_t deadline = shm::now_ns() + to_ns(timeout_s);
    while (true) {
      py::list records = drain(max_records);
      if (!records.empty() || ring_.consume_wake()) {
        return records;
      }
      const std::int64_t left = deadline - shm::now_ns();
      if (left <= 0) {
        return records;
      }
      wait_chunk(left, [this](std::int64_t chunk) { ring_.wait_for_record(chunk); });
      check_open();
    }
  }

  void look_at_most(double longest_s) {
    check_open();
    ring_.look_at_most(to_ns(longest_s));
  }

  void wake() {
    check_open();
    ring_.wake();
  }

  void close() {
    if (!closed_.exchange(true) && ring_.is_reader()) {
      ring_.mark_closed();
      ring_.wake();
    }
  }

  std::size_t capacity_bytes() const { return ring_.capacity_bytes(); }
  std::size_t pending_bytes() const { return ring_.pending_bytes(); }

  bool has_reader() const { return ring_.has_reader(); }

 private:
  // The reader's position is one thread's at a time.
  class ReaderTurn {
   public:
    explicit ReaderTurn(PyRing& owner) : owner_(owner) {
      if (!owner.ring_.is_reader()) {
        throw shm::RegionError("only the process that created " + owner.ring_.path() +
                               " receives from it; attach is for sending");
      }
      if (owner.receiving_.exchange(true)) {
        throw std::runtime_error("another thread is in receive(); a ring has one reader");
      }
    }
    ~ReaderTurn() { owner_.receiving_.store(false); }
    ReaderTurn(const ReaderTurn&) = delete;
    ReaderTurn& operator=(const ReaderTurn&) = delete;

   private:
    PyRing& owner_;
  };

  void check_open() const {
    if (closed_.load(std::memory_order_relaxed)) {
      throw shm::RingClosed("this end of " + ring_.path() + " has been closed");
    }
  }

  void send_slowly(const char* payload, std::size_t bytes, std::int64_t timeout_ns) {
    const std::int64_t deadline = shm::now_ns() + timeout_ns;
    while (true) {
      shm::Sent sent{};
      {
        const py::gil_scoped_release released;
        sent = ring_.send(payload, bytes, shm::kLockPatience);
        if (sent == shm::Sent::full) {
          ring_.check_reader();
        }
      }
      const std::int64_t left = deadline - shm::now_ns();
      if (sent == shm::Sent::committed) {
        return;
      }
      if (sent == shm::Sent::locked) {
        throw shm::RingFull("pid " + std::to_string(ring_.lock_holder_pid()) +
                            " has been writing to " + ring_.path() +
                            " for seconds; is it stopped? continue or kill it");
      }
      if (left <= 0) {
        throw shm::RingFull(ring_.path() + " has no room for " + std::to_string(bytes) +
                            " bytes; its reader is behind: send less, or make it larger");
      }
      wait_chunk(left, [&](std::int64_t chunk) { ring_.wait_for_space(bytes, chunk); });
      check_open();
    }
  }

  // What was taken before a failure is handed out first; the failure comes back with the next call.
  py::list drain(py::ssize_t max_records) {
    py::list records;
    try {
      std::size_t taken = 0;
      for (py::ssize_t count = 0; count < max_records && taken < kBatchBytes; ++count) {
        const auto bytes = ring_.next_length();
        if (!bytes) {
          break;
        }
        take_into(records, *bytes);
        taken += *bytes;
      }
    } catch (...) {
      if (records.empty()) throw;
    }
    if (!records.empty()) {
      ring_.release();
    }
    return records;
  }

  void take_into(py::list& records, std::size_t bytes) {
    auto record = py::reinterpret_steal<py::object>(
        PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(bytes)));
    if (!record || PyList_Append(records.ptr(), record.ptr()) != 0) {
      throw py::error_already_set();
    }
    char* target = PyBytes_AS_STRING(record.ptr());
    if (bytes >= kLongCopyBytes) {
      const py::gil_scoped_release released;
      ring_.take(target);
    } else {
      ring_.take(target);
    }
  }

  shm::Ring ring_;
  std::atomic<bool> closed_{false};
  std::atomic<bool> receiving_{false};
};

}  // namespace

void bind_ring(py::module_& module) {
  py::class_<PyRing>(module, "Ring")
      .def_static(
          "create",
          [](const std::string& path, std::size_t capacity_bytes) {
            return std::make_unique<PyRing>(shm::Ring::create(path, capacity_bytes));
          },
          py::arg("path"), py::arg("capacity_bytes"))
      .def_static(
          "attach",
          [](const std::string& path) { return std::make_unique<PyRing>(shm::Ring::attach(path)); },
          py::arg("path"))
      .def("send", &PyRing::send, py::arg("record"), py::arg("timeout_s") = 0.0)
      .def("receive", &PyRing::receive, py::arg("timeout_s"), py::arg("max_records") = 1024)
      .def("look_at_most", &PyRing::look_at_most, py::arg("longest_s"))
      .def("wake", &PyRing::wake)
      .def("close", &PyRing::close)
      .def_property_readonly("capacity_bytes", &PyRing::capacity_bytes)
      .def_property_readonly("pending_bytes", &PyRing::pending_bytes)
      .def_property_readonly("has_reader", &PyRing::has_reader);
  module.def("unlink", &shm::unlink_region, py::arg("path"));
}

}  // namespace aegaeon

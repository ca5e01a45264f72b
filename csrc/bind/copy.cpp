#include "bind/copy.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/time.h"
#include "copy/engine.h"
#include "copy/errors.h"

namespace py = pybind11;

namespace aegaeon {

using Addresses = std::tuple<std::uintptr_t, std::uintptr_t, std::size_t>;

// A ticket keeps its engine: it may be waited for after Python has let go of that.
class PyTicket {
 public:
  PyTicket(std::shared_ptr<copy::Engine> engine, copy::TicketPtr ticket)
      : engine_(std::move(engine)), ticket_(std::move(ticket)) {}
  ~PyTicket() {
    const py::gil_scoped_release released;  // the last one joins the engine's threads
    engine_.reset();
  }
  PyTicket(const PyTicket&) = delete;
  PyTicket& operator=(const PyTicket&) = delete;

  bool is(copy::Outcome outcome) const { return ticket_->outcome == outcome; }
  std::size_t total_bytes() const { return ticket_->total_bytes; }
  std::size_t progress_bytes() const {
    return ticket_->progress_bytes.load(std::memory_order_acquire);
  }
  double seconds() const { return engine_->seconds(*ticket_); }
  std::string failure() const { return engine_->failure(*ticket_); }

  bool wait(std::optional<std::size_t> bytes, double timeout_s) {
    const std::size_t wanted = bytes.value_or(ticket_->total_bytes);
    if (wanted > ticket_->total_bytes) {
      throw py::value_error("the ticket has " + std::to_string(ticket_->total_bytes) + " bytes; " +
                            std::to_string(wanted) + " will never be in");
    }
    const std::int64_t deadline = shm::now_ns() + to_ns(timeout_s);
    while (!ticket_->has(wanted) && !engine_->is_over(*ticket_)) {
      const std::int64_t left = deadline - shm::now_ns();
      if (left <= 0) break;
      wait_chunk(left, [&](std::int64_t chunk) { engine_->wait(*ticket_, wanted, chunk); });
    }
    if (ticket_->has(wanted)) return true;
    if (is(copy::Outcome::lost)) throw copy::LinkLost(failure());
    return false;
  }

  void cancel() {
    const py::gil_scoped_release released;
    engine_->cancel(ticket_);
  }

  void raise_priority(unsigned priority) { engine_->raise_priority(ticket_, priority); }

  const std::shared_ptr<copy::Engine>& engine() const { return engine_; }
  const copy::TicketPtr& ticket() const { return ticket_; }

 private:
  std::shared_ptr<copy::Engine> engine_;
  copy::TicketPtr ticket_;
};

class PyEngine {
 public:
  explicit PyEngine(std::shared_ptr<copy::Engine> engine) : engine_(std::move(engine)) {}
  ~PyEngine() {
    const py::gil_scoped_release released;
    engine_.reset();
  }
  PyEngine(const PyEngine&) = delete;
  PyEngine& operator=(const PyEngine&) = delete;

  std::unique_ptr<PyTicket> submit(const std::vector<Addresses>& segments, unsigned priority,
                                   const std::vector<const PyTicket*>& after, bool is_outward) {
    copy::Order order;
    order.segments.reserve(segments.size());
    for (const auto& [to, from, bytes] : segments) {
      order.segments.push_back(
          {reinterpret_cast<std::byte*>(to), reinterpret_cast<const std::byte*>(from), bytes});
    }
    order.priority = priority;
    order.is_outward = is_outward;
    std::vector<copy::TicketPtr> earlier;
    for (const PyTicket* ticket : after) {
      if (ticket == nullptr || ticket->engine() != engine_) {
        throw py::value_error("a copy waits for tickets of its own engine only");
      }
      earlier.push_back(ticket->ticket());
    }
    const py::gil_scoped_release released;
    return std::make_unique<PyTicket>(engine_, engine_->submit(std::move(order), earlier));
  }

  void close() {
    const py::gil_scoped_release released;
    engine_->close();
  }

  std::size_t open_tickets() const { return engine_->open_tickets(); }

 private:
  std::shared_ptr<copy::Engine> engine_;
};

namespace {

void bind_ticket(py::module_& module) {
  using copy::Outcome;
  py::class_<PyTicket>(module, "CopyTicket")
      .def_property_readonly("is_done", [](const PyTicket& self) { return self.is(Outcome::done); })
      .def_property_readonly("is_cancelled",
                             [](const PyTicket& self) { return self.is(Outcome::cancelled); })
      .def_property_readonly(
          "has_failed",
          [](const PyTicket& self) { return self.is(Outcome::failed) || self.is(Outcome::lost); })
      .def_property_readonly("failure", &PyTicket::failure)
      .def_property_readonly("total_bytes", &PyTicket::total_bytes)
      .def_property_readonly("progress_bytes", &PyTicket::progress_bytes)
      .def_property_readonly("seconds", &PyTicket::seconds)
      .def("wait", &PyTicket::wait, py::arg("bytes") = py::none(), py::arg("timeout_s") = 0.0)
      .def("cancel", &PyTicket::cancel)
      .def("raise_priority", &PyTicket::raise_priority, py::arg("priority"));
}

}  // namespace

py::object cast_copy_engine(std::shared_ptr<copy::Engine> engine) {
  return py::cast(std::make_unique<PyEngine>(std::move(engine)));
}

void bind_copy(py::module_& module) {
  bind_ticket(module);
  py::class_<PyEngine>(module, "CopyEngine")
      .def(py::init([](unsigned threads, std::size_t chunk_bytes, std::uint64_t link_bytes_per_s,
                       bool is_duplex) {
             return std::make_unique<PyEngine>(
                 copy::Engine::start({threads, chunk_bytes, link_bytes_per_s, is_duplex}));
           }),
           py::arg("threads") = 1, py::arg("chunk_bytes") = 1 << 20,
           py::arg("link_bytes_per_s") = 0, py::arg("is_duplex") = true)
      .def("submit", &PyEngine::submit, py::arg("segments"), py::arg("priority") = 1,
           py::arg("after") = py::tuple(), py::arg("is_outward") = false)
      .def("close", &PyEngine::close)
      .def_property_readonly("open_tickets", &PyEngine::open_tickets);
}

}  // namespace aegaeon

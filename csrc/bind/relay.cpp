#include "bind/relay.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "relay/line.h"
#include "relay/replies.h"
#include "relay/text.h"

namespace py = pybind11;

namespace aegaeon {
namespace {

// Tokens by their ids; `bytes_of` is asked for each that has text once.
class PyVocabulary {
 public:
  explicit PyVocabulary(py::object bytes_of) : bytes_of_(std::move(bytes_of)) {}

  // Null where there is no text. What it is asked for may raise.
  const relay::Token* find(std::uint32_t id) {
    const relay::Token* token = tokens_.find(id);
    if (token != nullptr) return token;
    auto bytes = py::cast<std::string>(bytes_of_(id));
    return bytes.empty() ? nullptr : &tokens_.enter(id, std::move(bytes));
  }

 private:
  py::object bytes_of_;
  relay::Vocabulary tokens_;
};

// A stream that may be lent to the relay, and what it calls meanwhile: its connection's transport,
// whose socket this writes to as long as the transport is open and holds nothing back; and `owner`,
// who hears of what was sent. `close` lets go of both.
class PyLine {
 public:
  using Wire = std::pair<py::object, int>;            // the transport, its socket
  using Names = std::pair<std::string, std::string>;  // the request's and the instance's
  using Form = std::pair<std::vector<std::string>, std::uint64_t>;  // parts, prompt's tokens

  PyLine(std::shared_ptr<PyVocabulary> vocabulary, const py::object& owner, const Wire& wire,
         const Names& names, const Form& form, bool hears_waits)
      : line_(names.first, names.second, {form.first, form.second}),
        vocabulary_(std::move(vocabulary)),
        hears_waits_(hears_waits),
        socket_(wire.second),
        is_closing_(wire.first.attr("is_closing")),
        held_bytes_(wire.first.attr("get_write_buffer_size")),
        write_(wire.first.attr("write")),
        absorb_(owner.attr("absorb")),
        fail_(owner.attr("fail")) {}

  relay::Line& line() { return line_; }

  void close() {
    is_closing_ = held_bytes_ = write_ = absorb_ = fail_ = py::none();
    vocabulary_.reset();
  }

  // Whether what is sent now comes behind all that was written before.
  bool is_free() const {
    return !py::cast<bool>(is_closing_()) && py::cast<std::size_t>(held_bytes_()) == 0;
  }

  void take(const std::uint32_t* ids, std::size_t count) {
    found_.clear();
    for (std::size_t n = 0; n < count; ++n) {
      if (const relay::Token* token = vocabulary_->find(ids[n])) found_.push_back(token);
    }
    line_.take(count, found_);
  }

  // What the socket does not take is the transport's, which also finds out about trouble.
  void send(std::string& chunk) {
    chunk.clear();
    line_.write_chunk(chunk);
    const std::size_t sent = relay::send_at_once(socket_, chunk);
    if (sent < chunk.size()) write_(py::bytes(chunk.data() + sent, chunk.size() - sent));
  }

  bool is_next(const relay::Reply& reply) const {
    return line_.is_next(reply) && (hears_waits_ || reply.waited.empty());
  }

  void absorb(const std::vector<std::uint32_t>& ids, double received_s,
              const std::string& waited) const {
    absorb_(ids, received_s, is_sent, py::bytes(waited));
  }
  void fail(const py::error_already_set& error) const { fail_(error.value()); }

  bool is_lent = false;
  bool is_touched = false;  // in this call of the relay's `take`
  bool is_sent = false;

 private:
  relay::Line line_;
  std::shared_ptr<PyVocabulary> vocabulary_;
  bool hears_waits_;
  int socket_;
  py::object is_closing_, held_bytes_, write_, absorb_, fail_;
  std::vector<const relay::Token*> found_;
};

// Takes the tokens of lent lines from records to sockets; all else is handed back. One thread's,
// that of the transports.
class PyRelay {
 public:
  void lend(const std::shared_ptr<PyLine>& lent, std::uint64_t attempt, std::uint64_t position,
            std::uint64_t made, std::string torn) {
    lent->line().begin(attempt, position, made, std::move(torn));
    lent->is_lent = true;
    lines_[lent->line().request()] = lent;
  }

  // Returns the beginning of a character that the line holds back.
  py::bytes recall(PyLine& line) {
    withdraw(line);
    return line.line().torn();
  }

  py::list take(const py::list& records) {
    if (lines_.empty()) return records;
    py::list rest;
    for (const py::handle item : records) take_record(py::cast<py::tuple>(item), rest);
    send_all();
    absorb_all();
    return rest;
  }

 private:
  struct Taken {
    std::shared_ptr<PyLine> line;
    std::vector<std::uint32_t> ids;
    double received_s;
    std::string waited;
  };

  void withdraw(PyLine& line) {
    if (!line.is_lent) return;
    line.is_lent = false;
    lines_.erase(line.line().request());
  }

  void take_record(const py::tuple& item, py::list& rest) {
    const auto record = py::cast<std::string_view>(item[0]);
    const auto received_s = py::cast<double>(item[1]);
    if (!replies_.read(record)) {
      rest.append(item);
      return;
    }
    std::string left;
    std::uint32_t count = 0;
    for (const relay::Reply& reply : replies_.all()) {
      if (take_reply(reply, received_s)) continue;
      left += reply.bytes;
      ++count;
    }
    if (count == replies_.all().size()) {
      rest.append(item);
    } else if (count > 0) {
      rest.append(py::make_tuple(py::bytes(array_of(count) + left), received_s));
    }
  }

  static std::string array_of(std::uint32_t count) {
    std::string head = "\xdd";
    for (int shift = 24; shift >= 0; shift -= 8) head += static_cast<char>(count >> shift & 0xff);
    return head;
  }

  // False when it is somebody else's: so is then all that comes behind it for the same stream.
  bool take_reply(const relay::Reply& reply, double received_s) {
    const auto found = lines_.find(std::string(reply.request));
    if (found == lines_.end()) return false;
    const std::shared_ptr<PyLine> line = found->second;
    try {
      if (reply.is_plain && line->is_next(reply) && (line->is_touched || line->is_free())) {
        const std::uint32_t* const ids = replies_.ids().data() + reply.first_id;
        line->take(ids, reply.ids);
        note(line, {ids, ids + reply.ids}, received_s, reply.waited);
        return true;
      }
    } catch (py::error_already_set&) {
      // Of what the line calls. Whoever takes the reply then meets it, too, and says so.
    }
    withdraw(*line);
    return false;
  }

  void note(const std::shared_ptr<PyLine>& line, std::vector<std::uint32_t> ids, double received_s,
            std::string_view waited) {
    taken_.push_back({line, std::move(ids), received_s, std::string(waited)});
    if (line->is_touched) return;
    line->is_touched = true;
    line->is_sent = false;
    touched_.push_back(line);
  }

  void send_all() {
    for (const std::shared_ptr<PyLine>& line : touched_) {
      line->is_touched = false;
      if (!line->line().has_text()) continue;
      line->is_sent = true;
      guarded(*line, [&] { line->send(chunk_); });
    }
    touched_.clear();
  }

  // Behind all that is sent: nobody waits for it.
  void absorb_all() {
    std::vector<Taken> taken;
    taken.swap(taken_);
    for (const Taken& one : taken) {
      guarded(*one.line, [&] { one.line->absorb(one.ids, one.received_s, one.waited); });
    }
  }

  // What fails for one stream fails that one.
  template <typename Work>
  void guarded(PyLine& line, const Work& work) {
    try {
      work();
    } catch (py::error_already_set& error) {
      withdraw(line);
      line.fail(error);
    }
  }

  std::unordered_map<std::string, std::shared_ptr<PyLine>> lines_;
  relay::Replies replies_;
  std::vector<std::shared_ptr<PyLine>> touched_;
  std::vector<Taken> taken_;
  std::string chunk_;
};

}  // namespace

void bind_relay(py::module_& module) {
  py::class_<PyVocabulary, std::shared_ptr<PyVocabulary>>(module, "TokenVocabulary")
      .def(py::init<py::object>(), py::arg("bytes_of"));
  py::class_<PyLine, std::shared_ptr<PyLine>>(module, "StreamLine")
      .def(py::init<std::shared_ptr<PyVocabulary>, const py::object&, const PyLine::Wire&,
                    const PyLine::Names&, const PyLine::Form&, bool>(),
           py::arg("vocabulary"), py::arg("owner"), py::arg("wire"), py::arg("names"),
           py::arg("form"), py::arg("hears_waits"))
      .def("close", &PyLine::close);
  py::class_<PyRelay>(module, "StreamRelay")
      .def(py::init<>())
      .def("lend", &PyRelay::lend, py::arg("line"), py::arg("attempt"), py::arg("position"),
           py::arg("made"), py::arg("torn"))
      .def("recall", &PyRelay::recall, py::arg("line"))
      .def("take", &PyRelay::take, py::arg("records"));
}

}  // namespace aegaeon

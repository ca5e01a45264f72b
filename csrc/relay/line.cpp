#include "relay/line.h"

#include <sys/socket.h>

#include <cerrno>
#include <charconv>
#include <stdexcept>
#include <utility>

namespace aegaeon::relay {
namespace {

void append_number(std::uint64_t value, int base, std::string& out) {
  char digits[24];
  const auto [end, error] = std::to_chars(digits, digits + sizeof digits, value, base);
  if (error == std::errc()) out.append(digits, end);
}

}  // namespace

Line::Line(std::string request, std::string instance, FrameForm form)
    : request_(std::move(request)), instance_(std::move(instance)), form_(std::move(form)) {
  if (form_.parts.size() != 2 && form_.parts.size() != 4) {
    throw std::invalid_argument("a frame has 2 or 4 parts, not " +
                                std::to_string(form_.parts.size()));
  }
}

void Line::begin(std::uint64_t attempt, std::uint64_t position, std::uint64_t made,
                 std::string torn) {
  attempt_ = attempt;
  position_ = position;
  made_ = made;
  text_.resume(std::move(torn));
  json_.clear();
}

bool Line::is_next(const Reply& reply) const {
  return reply.attempt == attempt_ && reply.position == position_ && reply.instance == instance_;
}

void Line::take(std::size_t count, const std::vector<const Token*>& tokens) {
  for (const Token* token : tokens) text_.push(*token, json_);
  position_ += count;
  made_ += count;
}

void Line::write_chunk(std::string& out) {
  // The numbers are in the length before they are in the body.
  std::string behind = form_.parts[1];
  if (form_.parts.size() == 4) {
    append_number(made_, 10, behind);
    behind += form_.parts[2];
    append_number(form_.prompt_tokens + made_, 10, behind);
    behind += form_.parts[3];
  }
  append_number(form_.parts[0].size() + json_.size() + 2 + behind.size(), 16, out);
  out += "\r\n";
  out += form_.parts[0];
  out += '"';
  out += json_;
  out += '"';
  out += behind;
  out += "\r\n";
  json_.clear();
}

std::size_t send_at_once(int socket, std::string_view bytes) {
  while (true) {
    const ssize_t sent = ::send(socket, bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent >= 0) return static_cast<std::size_t>(sent);
    if (errno != EINTR) return 0;
  }
}

}  // namespace aegaeon::relay

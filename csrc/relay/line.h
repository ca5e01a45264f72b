// One stream whose tokens become server-sent events without the interpreter, and the way to its
// socket. No Python here, and no decision about who may be served so.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "relay/replies.h"
#include "relay/text.h"

namespace aegaeon::relay {

// What stands around the text of a frame. Of four parts there are two numbers between the last
// three: the tokens made so far, and those with the prompt's.
struct FrameForm {
  std::vector<std::string> parts;  // 2, or 4
  std::uint64_t prompt_tokens = 0;
};

class Line {
 public:
  // Throws std::invalid_argument when there are neither 2 nor 4 parts.
  Line(std::string request, std::string instance, FrameForm form);

  const std::string& request() const { return request_; }

  // Of `attempt`, `position` tokens have come, and `made` are counted in frames; `torn` is the
  // beginning of a character.
  void begin(std::uint64_t attempt, std::uint64_t position, std::uint64_t made, std::string torn);

  // Whether `reply` is the very next of its attempt, from where it is expected.
  bool is_next(const Reply& reply) const;
  // Takes as many tokens in; those of them that have text.
  void take(std::size_t count, const std::vector<const Token*>& tokens);

  bool has_text() const { return !json_.empty(); }
  // Appends the frame with the text so far, as one chunk of an HTTP body, and forgets the text.
  void write_chunk(std::string& out);

  const std::string& torn() const { return text_.torn(); }

 private:
  std::string request_, instance_;
  FrameForm form_;
  std::uint64_t attempt_ = 0, position_ = 0, made_ = 0;
  Text text_;
  std::string json_;
};

// Sends what the socket takes at once and returns how much that was; of a socket in trouble none.
std::size_t send_at_once(int socket, std::string_view bytes);

}  // namespace aegaeon::relay

// The bytes of tokens as the text of a JSON string.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>

namespace aegaeon::relay {

// A token's bytes, and where they are whole characters, how they stand in a JSON string.
struct Token {
  std::string bytes;
  std::string json;
  bool is_whole = false;
};

// The tokens of one model that have been seen. Those without text are not kept.
class Vocabulary {
 public:
  // Null for one that has not been entered. What is returned stays as long as the vocabulary.
  const Token* find(std::uint32_t id) const;
  const Token& enter(std::uint32_t id, std::string bytes);

 private:
  std::unordered_map<std::uint32_t, Token> tokens_;
};

// UTF-8 that comes in pieces: what cannot be a character becomes U+FFFD as in Python's incremental
// decoder, the beginning of one is held back.
class Text {
 public:
  // Adds what is certain with `token` to the end of `json`.
  void push(const Token& token, std::string& json);

  // What is held back, 3 bytes at most.
  const std::string& torn() const { return torn_; }
  void resume(std::string torn) { torn_ = std::move(torn); }

 private:
  std::string torn_;
};

}  // namespace aegaeon::relay

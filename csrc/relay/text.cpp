#include "relay/text.h"

#include <utility>

namespace aegaeon::relay {
namespace {

constexpr char kReplacement[] = "\xef\xbf\xbd";

unsigned byte_of(char one) { return static_cast<unsigned char>(one); }

// What may follow a first byte: so many bytes, the first of them from `low` to `high`, the others
// from 80 to BF (The Unicode Standard, table 3-7). None where it is no first byte.
struct Lead {
  std::size_t follow;
  unsigned low, high;
};

Lead lead_of(unsigned first) {
  if (first >= 0xc2 && first <= 0xdf) return {1, 0x80, 0xbf};
  if (first == 0xe0) return {2, 0xa0, 0xbf};
  if (first == 0xed) return {2, 0x80, 0x9f};
  if (first >= 0xe1 && first <= 0xef) return {2, 0x80, 0xbf};
  if (first == 0xf0) return {3, 0x90, 0xbf};
  if (first >= 0xf1 && first <= 0xf3) return {3, 0x80, 0xbf};
  if (first == 0xf4) return {3, 0x80, 0x8f};
  return {0, 0, 0};
}

// Whether these are the first two of three bytes that would be half of a UTF-16 pair: no character,
// but Python's decoder waits for the third.
bool is_surrogate(std::string_view bytes) {
  return bytes.size() == 2 && byte_of(bytes[0]) == 0xed && byte_of(bytes[1]) >= 0xa0 &&
         byte_of(bytes[1]) <= 0xbf;
}

void append_ascii(unsigned one, std::string& json) {
  constexpr char kDigits[] = "0123456789abcdef";
  switch (one) {
    case '"':
      json += "\\\"";
      return;
    case '\\':
      json += "\\\\";
      return;
    case '\b':
      json += "\\b";
      return;
    case '\f':
      json += "\\f";
      return;
    case '\n':
      json += "\\n";
      return;
    case '\r':
      json += "\\r";
      return;
    case '\t':
      json += "\\t";
      return;
    default:
      break;
  }
  if (one < 0x20) {
    json += "\\u00";
    json += kDigits[one >> 4];
    json += kDigits[one & 15];
    return;
  }
  json += static_cast<char>(one);
}

// Adds the characters of `bytes` to `json`; returns how many bytes at the end only begin one.
// Sets `is_whole` to false where something was replaced.
std::size_t decode(std::string_view bytes, std::string& json, bool& is_whole) {
  std::size_t at = 0;
  while (at < bytes.size()) {
    const unsigned first = byte_of(bytes[at]);
    if (first < 0x80) {
      append_ascii(first, json);
      ++at;
      continue;
    }
    Lead lead = lead_of(first);
    std::size_t fit = 1;
    while (fit <= lead.follow && at + fit < bytes.size()) {
      const unsigned next = byte_of(bytes[at + fit]);
      if (next < lead.low || next > lead.high) break;
      lead.low = 0x80;
      lead.high = 0xbf;
      ++fit;
    }
    if (lead.follow > 0 && fit > lead.follow) {
      json.append(bytes, at, fit);
    } else if (lead.follow > 0 && at + fit == bytes.size()) {
      return fit;
    } else if (is_surrogate(bytes.substr(at))) {
      return 2;
    } else {
      json += kReplacement;
      is_whole = false;
    }
    at += fit;
  }
  return 0;
}

}  // namespace

const Token* Vocabulary::find(std::uint32_t id) const {
  const auto found = tokens_.find(id);
  return found == tokens_.end() ? nullptr : &found->second;
}

const Token& Vocabulary::enter(std::uint32_t id, std::string bytes) {
  Token token;
  bool is_whole = true;
  const std::size_t torn = decode(bytes, token.json, is_whole);
  token.is_whole = is_whole && torn == 0;
  token.bytes = std::move(bytes);
  return tokens_.insert_or_assign(id, std::move(token)).first->second;
}

void Text::push(const Token& token, std::string& json) {
  if (torn_.empty() && token.is_whole) {
    json += token.json;
    return;
  }
  const std::string bytes = torn_ + token.bytes;
  bool is_whole = true;
  torn_ = bytes.substr(bytes.size() - decode(bytes, json, is_whole));
}

}  // namespace aegaeon::relay

// Records and bytes of tokens that nobody meant, under the sanitizers: `relay_stress`. What is read
// of a record lies within it, and what becomes of bytes is UTF-8 inside a JSON string.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "relay/line.h"
#include "relay/replies.h"
#include "relay/text.h"

namespace {

using namespace aegaeon::relay;

std::mt19937 random_bits{11};

std::size_t below(std::size_t end) { return random_bits() % end; }

void require(bool claim, const char* what) {
  if (claim) return;
  std::fprintf(stderr, "relay_stress: %s\n", what);
  std::exit(1);
}

std::string text_of(std::string_view text) {
  return static_cast<char>(0xa0 | text.size()) + std::string(text);
}

std::string a_reply(char position) {
  std::string reply = "\x87" + text_of("type") + text_of("TokenEvent") + text_of("request_id") +
                      text_of("cmpl-0.0") + text_of("attempt") + '\0' + text_of("position");
  reply += position;
  reply += text_of("token_ids") + "\x93\x07\xcd\x01\x02\xce\x7f\xff\xff\xff";
  reply += text_of("waited") + "\x95\xcb" + std::string(8, '\0') + "\x01\xcd\x01\x01\x02\x03";
  return reply + text_of("instance") + text_of("instance-0");
}

// A copy that ends where its memory does.
struct Exact {
  explicit Exact(const std::string& text)
      : bytes(std::make_unique<char[]>(text.size())), size(text.size()) {
    std::memcpy(bytes.get(), text.data(), size);
  }
  std::string_view view() const { return {bytes.get(), size}; }
  std::unique_ptr<char[]> bytes;
  std::size_t size;
};

bool is_within(std::string_view part, std::string_view whole) {
  return part.empty() ||
         (part.data() >= whole.data() && part.data() + part.size() <= whole.data() + whole.size());
}

void read(const std::string& text, Replies& replies) {
  const Exact record(text);
  if (!replies.read(record.view())) {
    require(replies.all().empty(), "an unreadable record has replies");
    return;
  }
  std::size_t bytes = 0;
  for (const Reply& reply : replies.all()) {
    bytes += reply.bytes.size();
    require(is_within(reply.bytes, record.view()) && is_within(reply.request, reply.bytes) &&
                is_within(reply.instance, reply.bytes),
            "a reply leaves its record");
    if (!reply.is_plain) continue;
    require(reply.ids > 0 && reply.first_id + reply.ids <= replies.ids().size(),
            "tokens are not there");
  }
  require(bytes <= record.size, "replies are more than their record");
}

std::string damaged(std::string record) {
  const std::size_t times = 1 + below(4);
  for (std::size_t n = 0; n < times && !record.empty(); ++n) {
    const std::size_t at = below(record.size());
    switch (below(4)) {
      case 0:
        record.resize(at);
        break;
      case 1:
        record.erase(at, 1 + below(8));
        break;
      case 2:
        record.insert(at, record, below(record.size()), below(40));
        break;
      default:
        record[at] = static_cast<char>(random_bits());
    }
  }
  return record;
}

void read_records() {
  Replies replies;
  const std::string whole = "\xdc" + std::string("\0\3", 2) + a_reply(1) + a_reply(2) + a_reply(3);
  require(replies.read(whole) && replies.all().size() == 3, "a record is not read");
  for (const Reply& reply : replies.all()) {
    require(reply.is_plain && reply.ids == 3 && reply.request == "cmpl-0.0", "a reply is not read");
  }
  for (int n = 0; n < 60'000; ++n) read(damaged(n % 2 != 0 ? whole : a_reply(1)), replies);
  for (int n = 0; n < 20'000; ++n) {
    std::string noise(below(40), '\0');
    for (char& one : noise) one = static_cast<char>(random_bits());
    read(noise, replies);
  }
}

void write_frames() {
  Line line("r", "i", {{"a", "b", "c", "d"}, 9});
  Vocabulary vocabulary;
  for (std::uint32_t id = 0; id < 2'000; ++id) {
    std::string bytes(below(6), '\0');
    for (char& one : bytes)
      one = static_cast<char>(below(3) != 0 ? 0x80 | random_bits() : random_bits());
    vocabulary.enter(id, bytes);
  }
  line.begin(0, 1, 1, "\xe4\xb8");
  std::string out;
  for (int n = 0; n < 20'000; ++n) {
    std::vector<const Token*> tokens;
    for (std::size_t one = below(4); one > 0; --one) {
      tokens.push_back(vocabulary.find(static_cast<std::uint32_t>(below(2'000))));
    }
    line.take(tokens.size(), tokens);
    require(line.torn().size() <= 3, "more than a character is held back");
    if (!line.has_text()) continue;
    out.clear();
    line.write_chunk(out);
    const std::size_t body = std::strtoull(out.c_str(), nullptr, 16);
    require(out.size() == out.find("\r\n") + 2 + body + 2, "a chunk is not as long as it says");
  }
}

}  // namespace

int main() {
  read_records();
  write_frames();
  std::puts("relay_stress: ok");
}

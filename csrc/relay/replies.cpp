#include "relay/replies.h"

namespace aegaeon::relay {
namespace {

constexpr std::uint64_t kMaxId = (std::uint64_t{1} << 31) - 1;

// Reads msgpack (github.com/msgpack/msgpack/blob/master/spec.md). What returns false has moved
// nowhere.
class Reader {
 public:
  explicit Reader(std::string_view bytes) : at_(bytes.data()), end_(bytes.data() + bytes.size()) {}

  const char* at() const { return at_; }
  bool is_at_end() const { return at_ == end_; }

  bool read_array(std::uint64_t& count) { return read_head(0x90, 0x0f, 0xdc, 2, count); }
  bool read_map(std::uint64_t& count) { return read_head(0x80, 0x0f, 0xde, 2, count); }

  bool read_text(std::string_view& text) {
    const char* const before = at_;
    std::uint64_t bytes = 0;
    if (read_head(0xa0, 0x1f, 0xd9, 1, bytes) && bytes <= left()) {
      text = {at_, static_cast<std::size_t>(bytes)};
      at_ += bytes;
      return true;
    }
    at_ = before;
    return false;
  }

  // One that is not negative.
  bool read_integer(std::uint64_t& value) { return read_head(0x00, 0x7f, 0xcc, 1, value); }

  // Any that is not negative, and fractions.
  bool read_number() {
    std::uint64_t value = 0;
    if (read_integer(value)) return true;
    if (left() < 9 || byte() != 0xcb) return false;
    at_ += 9;
    return true;
  }

  // Any value, however deep; it takes a step for each byte at most.
  bool skip() {
    const char* const before = at_;
    std::uint64_t values = 1;
    while (values > 0) {
      if (!skip_head(values)) {
        at_ = before;
        return false;
      }
      --values;
    }
    return true;
  }

 private:
  std::size_t left() const { return static_cast<std::size_t>(end_ - at_); }
  unsigned byte() const { return static_cast<unsigned char>(*at_); }

  bool read_big_endian(std::size_t width, std::uint64_t& value) {
    if (width > left()) return false;
    value = 0;
    for (std::size_t n = 0; n < width; ++n) value = value << 8 | byte_of(*at_++);
    return true;
  }

  // A number within the first byte (`small` with the bits of `mask`), or behind it: `wide` says in
  // how many bytes, the code after it in twice as many, and so on up to four, of integers eight.
  bool read_head(unsigned small, unsigned mask, unsigned wide, std::size_t width,
                 std::uint64_t& value) {
    if (at_ == end_) return false;
    const unsigned head = byte();
    if ((head & ~mask) == small) {
      value = head & mask;
      ++at_;
      return true;
    }
    const std::size_t widest = wide == 0xcc ? 8 : 4;
    for (; width <= widest; width *= 2, ++wide) {
      if (head != wide) continue;
      const char* const before = at_++;
      if (read_big_endian(width, value)) return true;
      at_ = before;
      return false;
    }
    return false;
  }

  bool pass(std::uint64_t bytes) {
    if (bytes > left()) return false;
    at_ += bytes;
    return true;
  }

  // Passes over a value but for those within it, which are added to `values`.
  bool skip_head(std::uint64_t& values) {
    std::uint64_t count = 0;
    std::string_view text;
    if (read_array(count)) {
      values += count;
      return true;
    }
    if (read_map(count)) {
      values += 2 * count;
      return true;
    }
    if (read_text(text) || read_integer(count)) return true;
    if (at_ == end_) return false;
    const unsigned head = byte();
    ++at_;
    if (head >= 0xe0 || head == 0xc0 || head == 0xc2 || head == 0xc3) return true;
    if (head >= 0xc4 && head <= 0xc9) {  // bytes, and extensions, which have a type as well
      const bool is_extension = head >= 0xc7;
      const std::size_t width = std::size_t{1} << (head - (is_extension ? 0xc7 : 0xc4));
      return read_big_endian(width, count) && pass(count + (is_extension ? 1 : 0));
    }
    if (head == 0xca || head == 0xcb) return pass(head == 0xca ? 4 : 8);
    if (head >= 0xd0 && head <= 0xd3) return pass(std::uint64_t{1} << (head - 0xd0));
    if (head >= 0xd4 && head <= 0xd8) return pass(1 + (std::uint64_t{1} << (head - 0xd4)));
    return false;
  }

  static std::uint64_t byte_of(char one) { return static_cast<unsigned char>(one); }

  const char* at_;
  const char* end_;
};

// The fields of a TokenEvent that a plain one has, and has once.
constexpr unsigned kType = 1, kRequest = 2, kAttempt = 4, kPosition = 8, kIds = 16, kInstance = 32;
constexpr unsigned kAll = 63;
constexpr unsigned kWaited = 64;  // it may have that, too

bool read_ids(Reader& reader, std::vector<std::uint32_t>& ids) {
  std::uint64_t count = 0;
  if (!reader.read_array(count) || count == 0) return false;
  const std::size_t before = ids.size();
  for (std::uint64_t n = 0; n < count; ++n) {
    std::uint64_t id = 0;
    if (!reader.read_integer(id) || id > kMaxId) {
      ids.resize(before);
      return false;
    }
    ids.push_back(static_cast<std::uint32_t>(id));
  }
  return true;
}

// Two times, how often, and two times more.
bool read_waited(Reader& reader, std::string_view& waited) {
  const char* const begin = reader.at();
  std::uint64_t count = 0, switches = 0;
  const bool is_read = reader.read_array(count) && count == 5 && reader.read_number() &&
                       reader.read_number() && reader.read_integer(switches) &&
                       reader.read_number() && reader.read_number();
  waited = {begin, is_read ? static_cast<std::size_t>(reader.at() - begin) : 0};
  return is_read;
}

// Reads the value of `key` where it is as a plain event has it; 0 where it is not.
unsigned read_field(Reader& reader, std::string_view key, Reply& reply,
                    std::vector<std::uint32_t>& ids) {
  std::string_view type;
  if (key == "type") return reader.read_text(type) && type == "TokenEvent" ? kType : 0;
  if (key == "request_id") return reader.read_text(reply.request) ? kRequest : 0;
  if (key == "attempt") return reader.read_integer(reply.attempt) ? kAttempt : 0;
  if (key == "position") return reader.read_integer(reply.position) ? kPosition : 0;
  if (key == "instance") return reader.read_text(reply.instance) ? kInstance : 0;
  if (key == "waited") return read_waited(reader, reply.waited) ? kWaited : 0;
  if (key != "token_ids") return 0;
  reply.first_id = ids.size();
  if (!read_ids(reader, ids)) return 0;
  reply.ids = ids.size() - reply.first_id;
  return kIds;
}

bool read_reply(Reader& reader, Reply& reply, std::vector<std::uint32_t>& ids) {
  const char* const begin = reader.at();
  Reader fields = reader;
  std::uint64_t count = 0;
  if (!reader.skip() || !fields.read_map(count) || count == 0) return false;
  reply.bytes = {begin, static_cast<std::size_t>(reader.at() - begin)};
  unsigned seen = 0;
  bool is_odd = false;
  for (std::uint64_t n = 0; n < count; ++n) {
    std::string_view key;
    if (!fields.read_text(key)) {
      is_odd = true;
      fields.skip();
      fields.skip();
      continue;
    }
    const Reader value = fields;
    const unsigned field = read_field(fields, key, reply, ids);
    if (field == 0) {
      fields = value;
      fields.skip();
    }
    is_odd = is_odd || field == 0 || (seen & field) != 0;
    seen |= field;
  }
  reply.is_plain = !is_odd && (seen & kAll) == kAll;
  return true;
}

}  // namespace

bool Replies::read(std::string_view record) {
  replies_.clear();
  ids_.clear();
  Reader reader(record);
  std::uint64_t count = 1;
  reader.read_array(count);
  bool is_whole = true;
  for (std::uint64_t n = 0; n < count && is_whole; ++n) {
    Reply reply;
    is_whole = read_reply(reader, reply, ids_);
    if (is_whole) replies_.push_back(reply);
  }
  if (!is_whole || !reader.is_at_end()) {
    replies_.clear();
    return false;
  }
  return true;
}

}  // namespace aegaeon::relay

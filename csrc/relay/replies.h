// What instances say, as it lies in a mailbox: which replies of a record are tokens and nothing
// else. Nothing in a record is trusted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace aegaeon::relay {

// One reply: its bytes in the record, and the request that it is about ("" where none is named).
// Where it `is_plain`, it says that tokens came, perhaps what was waited for, and nothing else, and
// the rest is set: the tokens are `ids` of Replies::ids from `first_id` on, at least one, each
// below 2^31; `waited` are the bytes of a Waited, or none.
struct Reply {
  std::string_view bytes;
  std::string_view request;
  bool is_plain = false;
  std::string_view instance;
  std::uint64_t attempt = 0;
  std::uint64_t position = 0;
  std::size_t first_id = 0;
  std::size_t ids = 0;
  std::string_view waited;
};

// The replies of one record, which must outlive what is read of it.
class Replies {
 public:
  // False, with nothing to look at, when the record is no map, or array of maps, in msgpack.
  bool read(std::string_view record);

  const std::vector<Reply>& all() const { return replies_; }
  const std::vector<std::uint32_t>& ids() const { return ids_; }

 private:
  std::vector<Reply> replies_;
  std::vector<std::uint32_t> ids_;
};

}  // namespace aegaeon::relay

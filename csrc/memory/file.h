// A file descriptor that closes itself, and why a call on it has failed.
#pragma once

#include <unistd.h>

#include <cstring>
#include <string>
#include <utility>

namespace aegaeon::memory {

class File {
 public:
  explicit File(int descriptor = -1) : descriptor_(descriptor) {}
  File(File&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  File& operator=(File&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  ~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  int get() const { return descriptor_; }
  bool is_open() const { return descriptor_ >= 0; }

 private:
  int descriptor_;
};

inline std::string reason(int error) { return std::strerror(error); }

}  // namespace aegaeon::memory

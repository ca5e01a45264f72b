// A checkpoint file being read: past the page cache, or from it where the data lies there.
#pragma once

#include <sys/stat.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "memory/file.h"

namespace aegaeon::memory {

// What direct reads want of offsets, lengths and memory.
constexpr std::size_t kDirectAlignment = 4096;

// A file as it was when a load was planned; another one in its place, or a changed one, differs.
struct PlannedFile {
  std::string path;
  std::uint64_t size_bytes;
  std::int64_t mtime_ns;
  std::uint64_t inode;

  friend bool operator==(const PlannedFile& a, const PlannedFile& b) {
    return a.path == b.path && a.size_bytes == b.size_bytes && a.mtime_ns == b.mtime_ns &&
           a.inode == b.inode;
  }
};

// All of its failures are CheckpointError, and name the file.
class SourceFile {
 public:
  // Throws when there is no readable file, or not the one that was planned.
  explicit SourceFile(const PlannedFile& planned);

  // Throws when the file has no bytes [offset, offset + bytes).
  void check_range(std::uint64_t offset, std::uint64_t bytes) const;

  // Reads `bytes` at `offset` to somewhere in `buffer` and returns where. The buffer is aligned to
  // kDirectAlignment and has two such pages more than `bytes`. From any thread.
  const std::byte* read(std::uint64_t offset, std::size_t bytes, std::byte* buffer);

  // Throws when the file is not as it was planned.
  void check_unchanged() const;

 private:
  // Reads up to `wanted` bytes, at least `needed`. False: this kind of read is refused.
  bool read_at(int descriptor, std::uint64_t offset, std::byte* to, std::size_t wanted,
               std::size_t needed) const;
  bool is_cached(std::uint64_t offset, std::size_t bytes) const;
  bool is_planned(const struct stat& info) const;
  [[noreturn]] void fail(const std::string& what,
                         const char* remedy = "download or import the model again") const;

  PlannedFile planned_;
  File plain_;
  File direct_;  // closed where the file system has none
  std::atomic<bool> is_direct_;
};

}  // namespace aegaeon::memory

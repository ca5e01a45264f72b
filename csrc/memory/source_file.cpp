#include "memory/source_file.h"

#include <fcntl.h>
#include <sys/syscall.h>

#include <cerrno>

#include "memory/errors.h"

namespace aegaeon::memory {
namespace {

constexpr long kCachestat = 451;  // the same on all architectures; Linux 6.5

struct CachestatRange {
  std::uint64_t offset;
  std::uint64_t bytes;
};

struct Cachestat {
  std::uint64_t cached_pages;
  std::uint64_t dirty_pages;
  std::uint64_t writeback_pages;
  std::uint64_t evicted_pages;
  std::uint64_t recently_evicted_pages;
};

bool is_same(const timespec& a, const timespec& b) {
  return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec;
}

}  // namespace

// O_NONBLOCK: a FIFO in the place of a file must not hang us; it means nothing for files.
SourceFile::SourceFile(const std::string& path)
    : path_(path), plain_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
  if (!plain_.is_open()) {
    fail("cannot be opened: " + reason(errno));
  }
  if (fstat(plain_.get(), &opened_) != 0) {
    fail("cannot be examined: " + reason(errno));
  }
  if (!S_ISREG(opened_.st_mode)) {
    fail("is not a file");
  }
  direct_ = File(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_DIRECT));
  is_direct_.store(direct_.is_open());
}

void SourceFile::check_range(std::uint64_t offset, std::uint64_t bytes) const {
  const auto size = static_cast<std::uint64_t>(opened_.st_size);
  if (offset > size || bytes > size - offset) {
    fail("ends at " + std::to_string(size) + " bytes, a tensor at " +
         std::to_string(offset + bytes));
  }
}

const std::byte* SourceFile::read(std::uint64_t offset, std::size_t bytes, std::byte* buffer) {
  if (is_direct_.load(std::memory_order_relaxed) && !is_cached(offset, bytes)) {
    const std::uint64_t before = offset % kDirectAlignment;
    const std::size_t needed = before + bytes;
    const std::size_t wanted =
        (needed + kDirectAlignment - 1) / kDirectAlignment * kDirectAlignment;
    if (read_at(direct_.get(), offset - before, buffer, wanted, needed)) {
      return buffer + before;
    }
    is_direct_.store(false, std::memory_order_relaxed);
  }
  if (!read_at(plain_.get(), offset, buffer, bytes, bytes)) {
    fail("cannot be read: " + reason(EINVAL));
  }
  return buffer;
}

bool SourceFile::read_at(int descriptor, std::uint64_t offset, std::byte* to, std::size_t wanted,
                         std::size_t needed) const {
  std::size_t done = 0;
  while (done < needed) {
    const ssize_t count =
        pread(descriptor, to + done, wanted - done, static_cast<off_t>(offset + done));
    if (count > 0) {
      done += static_cast<std::size_t>(count);
    } else if (count == 0) {
      fail("ends at " + std::to_string(offset + done) + " bytes, a tensor at " +
           std::to_string(offset + needed));
    } else if (errno == EINVAL) {
      return false;  // also a direct read that goes on at an unaligned place after a short one
    } else if (errno != EINTR) {
      fail("cannot be read at " + std::to_string(offset + done) + ": " + reason(errno));
    }
  }
  return true;
}

// Data that lies in the page cache is ten times as near as the disk. Where the kernel cannot tell,
// it is not.
bool SourceFile::is_cached(std::uint64_t offset, std::size_t bytes) const {
  CachestatRange range{offset, bytes};
  Cachestat found{};
  if (syscall(kCachestat, plain_.get(), &range, &found, 0) != 0) {
    return false;
  }
  constexpr std::uint64_t kPageBytes = 4096;
  const std::uint64_t pages = (offset + bytes - 1) / kPageBytes - offset / kPageBytes + 1;
  return found.cached_pages >= pages;
}

void SourceFile::check_unchanged() const {
  struct stat now{};
  if (fstat(plain_.get(), &now) != 0 || now.st_size != opened_.st_size ||
      !is_same(now.st_mtim, opened_.st_mtim)) {
    fail("was changed while it was read");
  }
}

void SourceFile::fail(const std::string& what) const {
  throw CheckpointError(path_ + " " + what + "; download or import the model again");
}

}  // namespace aegaeon::memory

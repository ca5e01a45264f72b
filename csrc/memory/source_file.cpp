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

constexpr std::int64_t kNanoseconds = 1'000'000'000;
constexpr char kAskAgain[] = "leave it as it is, and ask for the model again";

}  // namespace

// O_NONBLOCK: a FIFO in the place of a file must not hang us; it means nothing for files.
SourceFile::SourceFile(const PlannedFile& planned)
    : planned_(planned), plain_(open(planned.path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
  if (!plain_.is_open()) {
    fail("cannot be opened: " + reason(errno));
  }
  struct stat info{};
  if (fstat(plain_.get(), &info) != 0) {
    fail("cannot be examined: " + reason(errno));
  }
  if (!S_ISREG(info.st_mode)) {
    fail("is not a file");
  }
  if (!is_planned(info)) {
    fail("was changed since it was planned", kAskAgain);
  }
  direct_ = File(open(planned.path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_DIRECT));
  // Opened by its name anew: another file may have come there.
  is_direct_.store(direct_.is_open() && fstat(direct_.get(), &info) == 0 && is_planned(info));
}

bool SourceFile::is_planned(const struct stat& info) const {
  return static_cast<std::uint64_t>(info.st_size) == planned_.size_bytes &&
         std::int64_t{info.st_mtim.tv_sec} * kNanoseconds + info.st_mtim.tv_nsec ==
             planned_.mtime_ns &&
         info.st_ino == planned_.inode;
}

void SourceFile::check_range(std::uint64_t offset, std::uint64_t bytes) const {
  const std::uint64_t size = planned_.size_bytes;
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
  if (fstat(plain_.get(), &now) != 0 || !is_planned(now)) {
    fail("was changed while it was read", kAskAgain);
  }
}

void SourceFile::fail(const std::string& what, const char* remedy) const {
  throw CheckpointError(planned_.path + " " + what + "; " + remedy);
}

}  // namespace aegaeon::memory

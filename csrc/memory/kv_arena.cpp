#include "memory/kv_arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "shm/errors.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace aegaeon::memory {
namespace {

constexpr std::size_t kPageBytes = 4096;
constexpr std::size_t kPopulateBytes = 256 << 10;

[[noreturn]] void fail(const std::string& what, const std::string& path, int error) {
  throw shm::RegionError("cannot " + what + " " + path + ": " + std::strerror(error));
}

}  // namespace

KvArena KvArena::anonymous(std::size_t bytes) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    throw shm::RegionError("cannot map " + std::to_string(bytes) +
                           " bytes for keys and values; lower --kv-budget-gb");
  }
  madvise(base, bytes, MADV_HUGEPAGE);
  return {static_cast<std::byte*>(base), bytes, -1, true};
}

KvArena KvArena::at(void* base, std::size_t bytes, std::shared_ptr<DeviceBytes> device) {
  return {static_cast<std::byte*>(base), bytes, -1, false, std::move(device)};
}

KvArena KvArena::create(const std::string& path, std::size_t bytes) {
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) {
    fail("replace", path, errno);
  }
  const int file = open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (file < 0) {
    fail("create", path, errno);
  }
  if (ftruncate(file, static_cast<off_t>(bytes)) != 0) {
    const int error = errno;
    ::close(file);
    fail("size", path, error);
  }
  return map_file(path, bytes, file);
}

KvArena KvArena::attach(const std::string& path, std::size_t bytes, std::uint64_t inode) {
  const int file = open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (file < 0) {
    fail("open", path, errno);
  }
  struct stat info{};
  if (fstat(file, &info) != 0 || !S_ISREG(info.st_mode) || info.st_ino != inode ||
      static_cast<std::size_t>(info.st_size) != bytes) {
    ::close(file);
    throw shm::RegionMismatch(path +
                              " is not the arena that its pool was made with; stop the servers "
                              "that use it and remove both files");
  }
  return map_file(path, bytes, file);
}

KvArena KvArena::map_file(const std::string& path, std::size_t bytes, int file) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  if (base == MAP_FAILED) {
    const int error = errno;
    ::close(file);
    fail("map", path, error);
  }
  madvise(base, bytes, MADV_HUGEPAGE);
  return {static_cast<std::byte*>(base), bytes, file, true};
}

KvArena::KvArena(KvArena&& other) noexcept
    : base_(std::exchange(other.base_, nullptr)),
      bytes_(other.bytes_),
      file_(std::exchange(other.file_, -1)),
      is_mapped_(std::exchange(other.is_mapped_, false)),
      device_(std::move(other.device_)) {}

KvArena::~KvArena() {
  if (is_mapped_) munmap(base_, bytes_);
  if (file_ >= 0) ::close(file_);
}

bool KvArena::reserve(std::size_t offset, std::size_t bytes) {
  if (file_ < 0) {
    return true;
  }
  int error = EINTR;
  while (error == EINTR) {
    error = posix_fallocate(file_, static_cast<off_t>(offset), static_cast<off_t>(bytes));
  }
  return error == 0;
}

// In pieces: whoever maps or unmaps something in this process waits while one is under way.
void KvArena::populate(std::size_t offset, std::size_t bytes) {
  if (device_) return;
  const std::size_t end = std::min(bytes_, offset + bytes);
  for (std::size_t at = offset / kPageBytes * kPageBytes; at < end; at += kPopulateBytes) {
    madvise(base_ + at, std::min(kPopulateBytes, end - at), MADV_POPULATE_WRITE);
  }
}

void KvArena::zero(std::size_t offset, std::size_t bytes) {
  if (device_) {
    device_->zero(base_ + offset, bytes);
  } else {
    std::memset(base_ + offset, 0, bytes);
  }
}

std::uint64_t KvArena::inode() const {
  struct stat info{};
  return file_ >= 0 && fstat(file_, &info) == 0 ? info.st_ino : 0;
}

}  // namespace aegaeon::memory

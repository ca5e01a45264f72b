#include "shm/owner.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <optional>
#include <string>

#include "shm/errors.h"

namespace aegaeon::shm {
namespace {

constexpr int kStartBits = 41;
constexpr std::uint64_t kStartMask = (std::uint64_t{1} << kStartBits) - 1;

std::optional<std::string> read_small_file(const char* path) {
  const int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) {
    return std::nullopt;
  }
  char text[1024];
  const ssize_t count = read(file, text, sizeof text);
  ::close(file);
  if (count <= 0) {
    return std::nullopt;
  }
  return std::string(text, static_cast<std::size_t>(count));
}

struct ProcessStat {
  char state;
  std::uint64_t threads;
  std::uint64_t start_ticks;
};

// Fields 3, 20 and 22 of /proc/<pid>/stat; the name before them may hold blanks and brackets.
std::optional<ProcessStat> read_stat(int pid) {
  const auto text = read_small_file(("/proc/" + std::to_string(pid) + "/stat").c_str());
  const std::size_t name_end = text ? text->rfind(") ") : std::string::npos;
  if (name_end == std::string::npos || name_end + 2 >= text->size()) {
    return std::nullopt;
  }
  ProcessStat stat{(*text)[name_end + 2], 0, 0};
  const char* cursor = text->c_str() + name_end + 3;
  for (int field = 4; field <= 22; ++field) {
    char* end = nullptr;
    const std::uint64_t value = std::strtoull(cursor, &end, 10);
    if (end == cursor) {
      return std::nullopt;
    }
    cursor = end;
    if (field == 20) stat.threads = value;
    if (field == 22) stat.start_ticks = value;
  }
  return stat;
}

Owner pack(int pid, std::uint64_t start_ticks) {
  return static_cast<Owner>(pid) << (kStartBits + 1) | (start_ticks & kStartMask) << 1;
}

std::atomic<Owner> cached_self{kNobody};

std::uint64_t inode_of(const char* path) {
  struct stat info{};
  return ::stat(path, &info) == 0 ? info.st_ino : 0;
}

std::uint64_t compute_host_identity() {
  std::string text = read_small_file("/proc/sys/kernel/random/boot_id").value_or("");
  text += std::to_string(inode_of("/proc/self/ns/pid")) + "/";
  text += std::to_string(inode_of("/proc/self/ns/time"));
  std::uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (const char letter : text) {
    hash = (hash ^ static_cast<unsigned char>(letter)) * 1099511628211u;
  }
  return hash;
}

}  // namespace

Owner self_owner() {
  const Owner known = cached_self.load(std::memory_order_relaxed);
  if (known != kNobody) {
    return known;
  }
  static const int registered = pthread_atfork(
      nullptr, nullptr, [] { cached_self.store(kNobody, std::memory_order_relaxed); });
  const int pid = getpid();
  const auto stat = read_stat(pid);
  if (!stat || registered != 0) {
    throw RegionError("cannot read /proc/self/stat; shared memory needs /proc to be mounted");
  }
  const Owner self = pack(pid, stat->start_ticks);
  cached_self.store(self, std::memory_order_relaxed);
  return self;
}

bool owner_is_alive(Owner owner) {
  const int pid = owner_pid(owner);
  if (pid <= 0 || (kill(pid, 0) != 0 && errno == ESRCH)) {
    return false;
  }
  const auto stat = read_stat(pid);
  if (!stat) {
    // Hidden from us, or gone since: only the kernel's answer counts.
    return kill(pid, 0) == 0 || errno != ESRCH;
  }
  // The first thread of a killed process is a zombie before its other threads have stopped.
  const bool ended = (stat->state == 'Z' || stat->state == 'X') && stat->threads <= 1;
  return !ended && pack(pid, stat->start_ticks) == (owner & ~Owner{1});
}

int owner_pid(Owner owner) { return static_cast<int>(owner >> (kStartBits + 1)); }

std::uint64_t host_identity() {
  static const std::uint64_t identity = compute_host_identity();
  return identity;
}

}  // namespace aegaeon::shm

#include "testing/cudart/memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <iterator>
#include <string>

namespace cudart {
namespace {

// What an opaque handle holds: whose file it is.
struct Shared {
  pid_t pid;
  int file;
  std::size_t bytes;
};
static_assert(sizeof(Shared) <= sizeof(cudaIpcMemHandle_t));

std::uintptr_t address_of(const void* place) { return reinterpret_cast<std::uintptr_t>(place); }

void* map(int file, std::size_t bytes) {
  const int flags = file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, file, 0);
  return base == MAP_FAILED ? nullptr : base;
}

}  // namespace

void Memory::reset(std::size_t device_bytes) {
  device_bytes_ = device_bytes;
  used_bytes_ = 0;
  ranges_.clear();
}

void* Memory::make(std::size_t bytes, Kind kind) {
  int file = -1;
  if (kind == Kind::device) {
    if (bytes > free_bytes()) return nullptr;
    file = memfd_create("device memory", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, static_cast<off_t>(bytes)) != 0) return nullptr;
    used_bytes_ += bytes;
  }
  return add(file, bytes, kind);
}

void* Memory::add(int file, std::size_t bytes, Kind kind) {
  void* base = map(file, bytes);
  if (base != nullptr) ranges_[address_of(base)] = {bytes, kind, file};
  return base;
}

bool Memory::free(void* base, Kind kind) {
  const auto found = ranges_.find(address_of(base));
  if (found == ranges_.end() || found->second.kind != kind) {
    return false;
  }
  if (kind == Kind::device) used_bytes_ -= found->second.bytes;
  if (found->second.file >= 0) close(found->second.file);
  munmap(base, found->second.bytes);
  ranges_.erase(found);
  return true;
}

bool Memory::enter(void* base, std::size_t bytes, Kind kind) {
  Kind known = Kind::pageable;
  if (!look_up(base, bytes, known) || known != Kind::pageable) {
    return false;
  }
  ranges_[address_of(base)] = {bytes, kind, -1};
  return true;
}

bool Memory::forget(void* base, Kind kind) {
  const auto found = ranges_.find(address_of(base));
  if (found == ranges_.end() || found->second.kind != kind) {
    return false;
  }
  ranges_.erase(found);
  return true;
}

Memory::Ranges::const_iterator Memory::find(const void* address) const {
  auto after = ranges_.upper_bound(address_of(address));
  if (after == ranges_.begin()) return ranges_.end();
  --after;
  return address_of(address) - after->first < after->second.bytes ? after : ranges_.end();
}

bool Memory::look_up(const void* address, std::size_t bytes, Kind& kind) const {
  const auto found = find(address);
  if (found != ranges_.end()) {
    kind = found->second.kind;
    return bytes <= found->second.bytes - (address_of(address) - found->first);
  }
  kind = Kind::pageable;
  const auto next = ranges_.upper_bound(address_of(address));
  return next == ranges_.end() || next->first - address_of(address) >= bytes;
}

bool Memory::share(const void* address, cudaIpcMemHandle_t& handle) const {
  const auto found = find(address);
  if (found == ranges_.end() || found->second.kind != Kind::device) {
    return false;
  }
  const Shared shared{getpid(), found->second.file, found->second.bytes};
  std::memset(&handle, 0, sizeof handle);
  std::memcpy(&handle, &shared, sizeof shared);
  return true;
}

// As the driver does, it refuses a process its own memory.
void* Memory::open(const cudaIpcMemHandle_t& handle) {
  Shared shared{};
  std::memcpy(&shared, &handle, sizeof shared);
  if (shared.pid == getpid()) return nullptr;
  const std::string path =
      "/proc/" + std::to_string(shared.pid) + "/fd/" + std::to_string(shared.file);
  const int file = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (file < 0) return nullptr;
  return add(file, shared.bytes, Kind::peer);
}

}  // namespace cudart

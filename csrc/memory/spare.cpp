#include "memory/spare.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <optional>

#include "memory/file.h"
#include "memory/huge_pages.h"
#include "shm/errors.h"
#include "shm/owner.h"

namespace aegaeon::memory {
namespace {

constexpr int kFlags = O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;

constexpr std::uint64_t whole_pages(std::uint64_t bytes) {
  return bytes / kHugePageBytes * kHugePageBytes;
}

// Sees that [at, at + kHugePageBytes) of the file, mapped at `address`, has memory: a huge page
// where the kernel has one to give, else small ones. False when there is no memory.
bool back(const File& file, std::uint64_t at, std::byte* address) {
  const auto offset = static_cast<off_t>(at);
  if (fallocate(file.get(), FALLOC_FL_KEEP_SIZE, offset, 4096) != 0) {
    return false;
  }
  return madvise(address + at, kHugePageBytes, MADV_COLLAPSE) == 0 ||
         fallocate(file.get(), FALLOC_FL_KEEP_SIZE, offset, kHugePageBytes) == 0;
}

// Takes back what back() has put at `at` behind the end of the file.
void trim(const File& file, std::uint64_t at) {
  struct stat info{};
  if (fstat(file.get(), &info) != 0) return;
  const std::uint64_t end = at + kHugePageBytes;
  const std::uint64_t begin = std::max(at, page_bytes(static_cast<std::uint64_t>(info.st_size)));
  if (begin < end) {
    fallocate(file.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(begin),
              static_cast<off_t>(end - begin));
  }
}

// Lets others go on when we end, however that is.
class Turn {
 public:
  explicit Turn(std::atomic<shm::Owner>& owner) : owner_(owner) { owner.store(shm::self_owner()); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  ~Turn() {
    shm::Owner self = shm::self_owner();
    owner_.compare_exchange_strong(self, shm::kNobody);
  }

 private:
  std::atomic<shm::Owner>& owner_;
};

}  // namespace

bool Spare::is_there() const {
  struct stat info{};
  return ::stat(path().c_str(), &info) == 0 && S_ISREG(info.st_mode);
}

bool Spare::is_taken(std::uint64_t number) const {
  return directory_.control().spare_number.load() != number;
}

void Spare::give(std::size_t slot) {
  Control& control = directory_.control();
  Entry& entry = directory_.entry(slot);
  const std::uint64_t bytes = entry.size_bytes.load();
  const std::uint64_t spare = control.spare_bytes.load();
  entry.ready_bytes.store(0);
  if (spare == 0) {
    return;
  }
  const std::uint64_t together = directory_.used_bytes() + spare;
  if (bytes < spare / 2 && together <= directory_.budget_bytes()) {
    return;
  }
  control.spare_number.fetch_add(1);
  control.spare_owner.store(shm::kNobody);
  if (::rename(path().c_str(), directory_.data_path(slot).c_str()) == 0) {
    entry.ready_bytes.store(std::min(control.spare_ready.load(), whole_pages(bytes)));
  } else {
    ::unlink(path().c_str());
  }
  control.spare_bytes.store(0);
}

bool Spare::recycle(std::size_t slot) {
  Control& control = directory_.control();
  const Entry& entry = directory_.entry(slot);
  const std::uint64_t bytes = entry.size_bytes.load();
  if (bytes < kHugePageBytes || (control.spare_bytes.load() != 0 && is_there())) {
    return false;
  }
  control.spare_ready.store(std::min(entry.ready_bytes.load(), whole_pages(bytes)));
  control.spare_bytes.store(page_bytes(bytes));
  if (::rename(directory_.data_path(slot).c_str(), path().c_str()) != 0) {
    control.spare_bytes.store(0);
    return false;
  }
  return true;
}

void Spare::prepare(std::uint64_t bytes, const std::function<bool()>& is_unwanted) {
  Control& control = directory_.control();
  std::uint64_t number = 0;
  std::optional<Turn> turn;
  {
    const Directory::Locked held(directory_);
    if (!begin(bytes)) return;
    number = control.spare_number.load();
    turn.emplace(control.spare_owner);
  }
  if (fill(number, is_unwanted)) {
    return;
  }
  const Directory::Locked held(directory_);
  if (!is_taken(number)) {
    ::unlink(path().c_str());
    control.spare_bytes.store(0);
  }
}

// With the lock. Makes the spare, or a longer one of it; false when nothing is left to do for us.
bool Spare::begin(std::uint64_t bytes) {
  Control& control = directory_.control();
  const shm::Owner owner = control.spare_owner.load();
  if (owner == shm::self_owner() || shm::owner_is_alive(owner)) {
    return false;
  }
  if (!is_there()) {
    control.spare_bytes.store(0);
    control.spare_ready.store(0);
  }
  const std::uint64_t used = directory_.used_bytes();
  const std::uint64_t room = directory_.budget_bytes() - std::min(used, directory_.budget_bytes());
  const std::uint64_t target = whole_pages(std::min(bytes + kHugePageBytes - 1, room));
  const std::uint64_t before = control.spare_bytes.load();
  if (target <= before) {
    return control.spare_ready.load() < whole_pages(before);
  }
  control.spare_bytes.store(target);
  const File file(::open(path().c_str(), kFlags | O_CREAT, 0600));
  if (!file.is_open() || ftruncate(file.get(), static_cast<off_t>(target)) != 0) {
    const int error = errno;
    ::unlink(path().c_str());
    control.spare_bytes.store(0);
    throw shm::RegionError("cannot make " + path() + ": " + reason(error) +
                           "; free memory there, or lower --model-cache-budget-gb");
  }
  return true;
}

// False when the file system has no memory for it.
bool Spare::fill(std::uint64_t number, const std::function<bool()>& is_unwanted) {
  Control& control = directory_.control();
  const File file(::open(path().c_str(), kFlags));
  struct stat info{};
  if (!file.is_open() || fstat(file.get(), &info) != 0) {
    return is_taken(number);
  }
  const std::uint64_t end = whole_pages(static_cast<std::uint64_t>(info.st_size));
  const HugeMapping mapping(file.get(), end, PROT_READ | PROT_WRITE);
  if (mapping.address() == nullptr) {
    return false;
  }
  for (std::uint64_t at = control.spare_ready.load(); at < end; at += kHugePageBytes) {
    if (is_taken(number) || is_unwanted()) {
      return true;
    }
    if (!back(file, at, mapping.address())) {
      return is_taken(number);
    }
    if (is_taken(number)) {
      trim(file, at);
      return true;
    }
    control.spare_ready.store(at + kHugePageBytes);
  }
  return true;
}

}  // namespace aegaeon::memory

#include "memory/spare.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <optional>

#include "shm/errors.h"
#include "shm/owner.h"

namespace aegaeon::memory {
namespace {

constexpr int kFlags = O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;
// Of the file system: what is left to others, and what they have to be short of.
constexpr unsigned kShareLeft = 16;
constexpr unsigned kShareMissed = 32;

// Sees that there is memory behind `address`. Unlike fallocate(2) it gives none behind the end of
// the file, wherever that is by then. A signal, of which a server gets many, may end the call.
bool populate(std::byte* address, std::size_t bytes) {
  int result = 0;
  do {
    result = madvise(address, bytes, MADV_POPULATE_WRITE);
  } while (result != 0 && errno == EINTR);
  return result == 0;
}

// Sees that the huge page at `address` has memory: in one piece where the kernel has one to give,
// else in small ones. False when there is no memory, or the file has come to end before it.
bool back(std::byte* address) {
  return populate(address, 4096) && (madvise(address, kHugePageBytes, MADV_COLLAPSE) == 0 ||
                                     populate(address, kHugePageBytes));
}

// Makes us the owner of a part of the work, until we end, however that is.
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

// Of none when there is no spare.
std::uint64_t Spare::file_bytes() const {
  struct stat info{};
  const bool is_file = ::lstat(path().c_str(), &info) == 0 && S_ISREG(info.st_mode);
  return is_file ? static_cast<std::uint64_t>(info.st_size) : 0;
}

bool Spare::is_taken(std::uint64_t word) const {
  return number_of(directory_.control().spare_word.load()) != number_of(word);
}

// Whether a `share`th of the file system is free beside `bytes`; so it is in one without a limit.
bool Spare::has_room(std::uint64_t bytes, unsigned share) const {
  struct statvfs space{};
  return ::statvfs(directory_.path().c_str(), &space) != 0 || space.f_blocks == 0 ||
         space.f_bavail >= space.f_blocks / share + bytes / space.f_frsize;
}

// With the lock. From now on nobody adds to what was ready, which is returned.
std::uint64_t Spare::next_number(std::uint64_t ready_bytes) {
  std::atomic<std::uint64_t>& word = directory_.control().spare_word;
  const std::uint64_t before = word.fetch_add(spare_word_of(1, 0));
  word.store(spare_word_of(number_of(before) + 1, ready_bytes));
  return ready_of(before);
}

void Spare::drop() {
  next_number(0);
  remove_file(path());
  directory_.control().spare_bytes.store(0);
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
  if (bytes < spare / 2 && together <= directory_.budget_bytes() &&
      has_room(page_bytes(bytes), kShareMissed)) {
    return;
  }
  const std::uint64_t ready = next_number(0);
  control.spare_owner.store(shm::kNobody);
  if (is_free_to_cut(bytes) && ::rename(path().c_str(), directory_.data_path(slot).c_str()) == 0) {
    entry.ready_bytes.store(std::min(ready, whole_huge_pages(bytes)));
  } else {
    remove_file(path());
  }
  control.spare_bytes.store(0);
}

// Ends the spare where the last whole huge page of a model of `bytes` does. Nobody adds to it
// behind that end afterwards, but when it grows to that of the model, one who was late could back
// all of the huge page in which that is. So not while somebody is at that one.
bool Spare::is_free_to_cut(std::uint64_t bytes) const {
  const Control& control = directory_.control();
  const std::uint64_t end = whole_huge_pages(bytes);
  const bool is_one_late =
      shm::owner_is_alive(control.step_owner.load()) && control.step_at.load() == end;
  return !is_one_late &&
         (file_bytes() <= end || ::truncate(path().c_str(), static_cast<off_t>(end)) == 0);
}

bool Spare::recycle(std::size_t slot) {
  Control& control = directory_.control();
  const Entry& entry = directory_.entry(slot);
  const std::uint64_t bytes = entry.size_bytes.load();
  if (bytes < kHugePageBytes || (control.spare_bytes.load() != 0 && file_bytes() != 0)) {
    return false;
  }
  next_number(std::min(entry.ready_bytes.load(), whole_huge_pages(bytes)));
  control.spare_owner.store(shm::kNobody);
  control.spare_bytes.store(page_bytes(bytes));
  if (::rename(directory_.data_path(slot).c_str(), path().c_str()) != 0) {
    control.spare_bytes.store(0);
    return false;
  }
  return true;
}

bool Spare::prepare(std::uint64_t bytes, const std::function<bool()>& is_unwanted) {
  Control& control = directory_.control();
  std::uint64_t word = 0;
  std::optional<Turn> turn;
  {
    const Directory::Locked held(directory_);
    const shm::Owner owner = control.spare_owner.load();
    if (shm::owner_is_alive(owner) || shm::owner_is_alive(control.step_owner.load())) return true;
    if (give_way()) return false;
    if (!begin(bytes)) return true;
    word = control.spare_word.load();
    turn.emplace(control.spare_owner);
  }
  if (fill(word, is_unwanted)) {
    return true;
  }
  const Directory::Locked held(directory_);
  if (!is_taken(word)) give_way();
  return false;
}

// With the lock. True when others are short of the memory that the spare has had until now.
bool Spare::give_way() {
  if (file_bytes() == 0 || has_room(0, kShareMissed)) {
    return false;
  }
  drop();
  return true;
}

// With the lock. Makes the spare, or a longer one of it; false when nothing is left to do for us.
bool Spare::begin(std::uint64_t bytes) {
  Control& control = directory_.control();
  if (control.spare_bytes.load() == 0 || file_bytes() == 0) {
    drop();  // its rest, or that of a cache that was removed without it
  }
  const std::uint64_t used = directory_.used_bytes();
  const std::uint64_t room = directory_.budget_bytes() - std::min(used, directory_.budget_bytes());
  const std::uint64_t target = whole_huge_pages(std::min(bytes + kHugePageBytes - 1, room));
  const std::uint64_t before = file_bytes();
  if (target <= before) {
    return ready_of(control.spare_word.load()) < whole_huge_pages(before);
  }
  control.spare_bytes.store(target);
  const File file(::open(path().c_str(), kFlags | O_CREAT, 0600));
  if (!file.is_open() || ftruncate(file.get(), static_cast<off_t>(target)) != 0) {
    const int error = errno;
    drop();
    throw shm::RegionError("cannot make " + path() + ": " + reason(error) +
                           "; free memory there, or lower --model-cache-budget-gb");
  }
  return true;
}

// False when the file system has no memory for it.
bool Spare::fill(std::uint64_t word, const std::function<bool()>& is_unwanted) {
  const File file(::open(path().c_str(), kFlags));
  struct stat info{};
  if (!file.is_open() || fstat(file.get(), &info) != 0) {
    return is_taken(word);
  }
  const std::uint64_t end = whole_huge_pages(static_cast<std::uint64_t>(info.st_size));
  const HugeMapping mapping(file.get(), end, PROT_READ | PROT_WRITE);
  if (mapping.address() == nullptr) {
    return false;
  }
  for (; ready_of(word) < end; ++word) {
    if (is_unwanted() || !step(word, mapping.address())) return is_taken(word) || is_unwanted();
  }
  return true;
}

// Adds a huge page to what is ready; false when there is no memory or it is another's by now. That
// we are at it is said before we look whose it is: one of us sees the other, see is_free_to_cut.
bool Spare::step(std::uint64_t word, std::byte* address) {
  Control& control = directory_.control();
  control.step_at.store(ready_of(word));
  const Turn turn(control.step_owner);
  std::uint64_t expected = word;
  return !is_taken(word) && has_room(kHugePageBytes, kShareLeft) &&
         back(address + ready_of(word)) &&
         control.spare_word.compare_exchange_strong(expected, word + 1);
}

}  // namespace aegaeon::memory

#include "shm/ring.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <new>
#include <utility>

#include "shm/errors.h"

namespace aegaeon::shm {

constexpr std::size_t kLine = 64;

// What different sides write lies on different cache lines.
struct RingControl {
  alignas(kLine) OwnerLock lock;
  std::atomic<std::uint64_t> seen_tail;  // of the last writer that looked; guarded by the lock
  alignas(kLine) std::atomic<std::uint64_t> head;
  alignas(kLine) std::atomic<std::uint64_t> tail;
  alignas(kLine) std::atomic<std::uint32_t> record_signal;
  std::atomic<std::uint32_t> reader_waits;
  alignas(kLine) std::atomic<std::uint32_t> space_signal;
  std::atomic<std::uint32_t> writers_wait;
  alignas(kLine) std::atomic<std::uint32_t> is_closed;
  std::atomic<std::uint32_t> wake_asked;
  std::atomic<Owner> reader;
};

namespace {

constexpr std::size_t kControlBytes = 4096;
constexpr std::size_t kMinCapacity = 4096;
constexpr std::size_t kMaxCapacity = std::size_t{1} << 32;

static_assert(sizeof(RingControl) <= kControlBytes);

struct RecordHeader {
  std::uint32_t bytes;
  std::uint32_t check;  // ties the length to its position, so that damage is seen
};

constexpr std::size_t footprint(std::size_t bytes) {
  return sizeof(RecordHeader) + ((bytes + 7) & ~std::size_t{7});
}

constexpr std::uint32_t check_of(std::uint64_t position, std::uint32_t bytes) {
  return static_cast<std::uint32_t>((position ^ bytes) * 0x9e3779b97f4a7c15u >> 32);
}

std::size_t rounded_capacity(const std::string& path, std::size_t bytes) {
  if (bytes > kMaxCapacity) {
    throw RegionError(path + ": a ring of " + std::to_string(bytes) +
                      " bytes is too large; the limit is " + std::to_string(kMaxCapacity));
  }
  std::size_t capacity = kMinCapacity;
  while (capacity < bytes) {
    capacity *= 2;
  }
  return capacity;
}

}  // namespace

Ring::Ring(Region region, bool is_reader)
    : region_(std::move(region)),
      control_(std::launder(reinterpret_cast<RingControl*>(region_.body()))),
      records_(region_.body() + kControlBytes),
      capacity_(region_.parameters()[0]),
      reader_(is_reader ? self_owner() : kNobody) {}

Ring Ring::create(const std::string& path, std::size_t capacity_bytes) {
  const std::size_t capacity = rounded_capacity(path, capacity_bytes);
  const auto initialise = [](std::byte* body) {
    auto* control = new (body) RingControl();
    control->reader.store(self_owner(), std::memory_order_relaxed);
  };
  return Ring(Region::create(path, RegionKind::ring, {capacity, kMaxRecordBytes},
                             kControlBytes + capacity, initialise),
              true);
}

Ring Ring::attach(const std::string& path) {
  Region region = Region::attach(path, RegionKind::ring);
  const auto [capacity, max_record] = region.parameters();
  if (capacity < kMinCapacity || capacity > kMaxCapacity || (capacity & (capacity - 1)) != 0 ||
      max_record != kMaxRecordBytes || region.body_bytes() != kControlBytes + capacity) {
    throw RegionMismatch(path + " claims a ring of " + std::to_string(capacity) +
                         " bytes with records up to " + std::to_string(max_record) +
                         ", this process has " + std::to_string(kMaxRecordBytes) +
                         "; stop the servers that use it and remove the file");
  }
  return Ring(std::move(region), false);
}

Sent Ring::send(const void* payload, std::size_t bytes, std::int64_t patience_ns) {
  const std::size_t limit = std::min(kMaxRecordBytes, capacity_ - sizeof(RecordHeader));
  if (bytes > limit) {
    throw RecordTooLarge("a record of " + std::to_string(bytes) + " bytes does not fit; " + path() +
                         " takes up to " + std::to_string(limit));
  }
  if (control_->is_closed.load(std::memory_order_relaxed) != 0) {
    check_reader();
  }
  const Owner self = self_owner();
  if (!(patience_ns > 0 ? control_->lock.lock(self, patience_ns) : control_->lock.try_lock(self))) {
    return Sent::locked;
  }
  {
    const OwnerLockGuard held(control_->lock);
    if (!append(payload, bytes)) {
      return Sent::full;
    }
  }
  notify_reader();
  return Sent::committed;
}

bool Ring::append(const void* payload, std::size_t bytes) {
  const std::size_t need = footprint(bytes);
  const std::uint64_t head = control_->head.load(std::memory_order_relaxed);
  if (free_bytes(head, control_->seen_tail.load(std::memory_order_relaxed)) < need) {
    const std::uint64_t tail = control_->tail.load(std::memory_order_acquire);
    const std::size_t free = free_bytes(head, tail);
    control_->seen_tail.store(tail, std::memory_order_relaxed);
    if (free < need) {
      return false;
    }
  }
  const auto length = static_cast<std::uint32_t>(bytes);
  const RecordHeader header{length, check_of(head, length)};
  copy_in(head, &header, sizeof header);
  copy_in(head + sizeof header, payload, bytes);
  control_->head.store(head + need, std::memory_order_seq_cst);
  return true;
}

std::size_t Ring::free_bytes(std::uint64_t head, std::uint64_t tail) const {
  const std::uint64_t used = head - tail;
  if (used > capacity_ || ((head | tail) & 7) != 0) {
    damaged("its positions make no sense");
  }
  return capacity_ - used;
}

void Ring::copy_in(std::uint64_t position, const void* from, std::size_t bytes) {
  const std::size_t at = position & (capacity_ - 1);
  const std::size_t first = std::min(bytes, capacity_ - at);
  std::memcpy(records_ + at, from, first);
  if (first < bytes) {
    std::memcpy(records_, static_cast<const std::byte*>(from) + first, bytes - first);
  }
}

void Ring::copy_out(std::uint64_t position, void* to, std::size_t bytes) const {
  const std::size_t at = position & (capacity_ - 1);
  const std::size_t first = std::min(bytes, capacity_ - at);
  std::memcpy(to, records_ + at, first);
  if (first < bytes) {
    std::memcpy(static_cast<std::byte*>(to) + first, records_, bytes - first);
  }
}

void Ring::notify_reader() {
  // The exchange leaves the system call to one of the writers.
  if (control_->reader_waits.load(std::memory_order_seq_cst) != 0 &&
      control_->reader_waits.exchange(0, std::memory_order_seq_cst) != 0) {
    control_->record_signal.fetch_add(1, std::memory_order_seq_cst);
    futex_wake(control_->record_signal, 1);
  }
}

void Ring::wait_for_space(std::size_t bytes, std::int64_t timeout_ns) {
  control_->writers_wait.store(1, std::memory_order_seq_cst);
  const std::uint32_t signal = control_->space_signal.load(std::memory_order_seq_cst);
  const std::uint64_t tail = control_->tail.load(std::memory_order_seq_cst);
  // Without the lock the two may not belong together; then send() looks again.
  const std::uint64_t used = control_->head.load(std::memory_order_relaxed) - tail;
  if (used > capacity_ || capacity_ - used >= footprint(bytes) ||
      control_->is_closed.load(std::memory_order_seq_cst) != 0) {
    return;
  }
  futex_wait(control_->space_signal, signal, timeout_ns);
}

void Ring::check_reader() const {
  if (control_->is_closed.load(std::memory_order_relaxed) != 0) {
    throw RingClosed(path() + " was closed by its reader; open it again if it has come back");
  }
  const Owner reader = control_->reader.load(std::memory_order_relaxed);
  if (!owner_is_alive(reader)) {
    throw RingClosed("the reader of " + path() + ", pid " + std::to_string(owner_pid(reader)) +
                     ", is dead; open it again when it has come back");
  }
}

bool Ring::has_reader() const {
  return control_->is_closed.load(std::memory_order_relaxed) == 0 &&
         owner_is_alive(control_->reader.load(std::memory_order_relaxed));
}

int Ring::lock_holder_pid() const { return owner_pid(control_->lock.holder()); }

std::optional<std::size_t> Ring::next_length() {
  if (head_ == tail_) {
    head_ = control_->head.load(std::memory_order_acquire);
    if (head_ == tail_) {
      return std::nullopt;
    }
    free_bytes(head_, tail_);
  }
  RecordHeader header;
  copy_out(tail_, &header, sizeof header);
  if (header.check != check_of(tail_, header.bytes) || header.bytes > kMaxRecordBytes ||
      footprint(header.bytes) > head_ - tail_) {
    damaged("a record has an impossible length");
  }
  announced_ = header.bytes;
  return announced_;
}

void Ring::take(void* payload) {
  copy_out(tail_ + sizeof(RecordHeader), payload, announced_);
  tail_ += footprint(announced_);
}

void Ring::release() {
  control_->tail.store(tail_, std::memory_order_seq_cst);
  if (control_->writers_wait.load(std::memory_order_seq_cst) != 0 &&
      control_->writers_wait.exchange(0, std::memory_order_seq_cst) != 0) {
    control_->space_signal.fetch_add(1, std::memory_order_seq_cst);
    futex_wake(control_->space_signal, INT_MAX);
  }
}

void Ring::wait_for_record(std::int64_t timeout_ns) {
  const auto is_over = [this] {
    return control_->head.load(std::memory_order_relaxed) != tail_ ||
           control_->wake_asked.load(std::memory_order_relaxed) != 0;
  };
  const std::int64_t start = now_ns();
  if (!spin_.look(timeout_ns, is_over)) {
    control_->reader_waits.store(1, std::memory_order_seq_cst);
    const std::uint32_t signal = control_->record_signal.load(std::memory_order_seq_cst);
    if (control_->head.load(std::memory_order_seq_cst) == tail_ &&
        control_->wake_asked.load(std::memory_order_seq_cst) == 0) {
      futex_wait(control_->record_signal, signal, timeout_ns);
    }
    control_->reader_waits.store(0, std::memory_order_relaxed);
  }
  spin_.learn(start, now_ns());
}

bool Ring::consume_wake() {
  return control_->wake_asked.load(std::memory_order_relaxed) != 0 &&
         control_->wake_asked.exchange(0, std::memory_order_seq_cst) != 0;
}

void Ring::wake() {
  control_->wake_asked.store(1, std::memory_order_seq_cst);
  notify_reader();
}

void Ring::mark_closed() {
  control_->is_closed.store(1, std::memory_order_seq_cst);
  control_->space_signal.fetch_add(1, std::memory_order_seq_cst);
  futex_wake(control_->space_signal, INT_MAX);
}

bool Ring::is_reader() const { return reader_ != kNobody && reader_ == self_owner(); }

std::size_t Ring::pending_bytes() const {
  const std::uint64_t tail = control_->tail.load(std::memory_order_relaxed);
  const std::uint64_t head = control_->head.load(std::memory_order_relaxed);
  return std::min<std::uint64_t>(head - tail, capacity_);
}

void Ring::damaged(const char* what) const {
  throw RegionMismatch(path() + " is damaged: " + what +
                       "; restart the servers that use it, which makes it anew");
}

bool unlink_region(const std::string& path) {
  try {
    Ring::attach(path).mark_closed();
  } catch (const Error&) {
    // No ring, or a damaged one: there is nobody to tell.
  }
  if (::unlink(path.c_str()) == 0) {
    return true;
  }
  if (errno == ENOENT) {
    return false;
  }
  throw RegionError("cannot remove " + path + ": " + std::strerror(errno));
}

}  // namespace aegaeon::shm

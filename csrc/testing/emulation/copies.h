// A thread's asynchronous copies: done at once or as late as is allowed, so that whoever reads too
// early, or writes too early over what is read, is seen in the results.
#pragma once

#include <cstddef>

#include "testing/emulation/block.h"

namespace aegaeon::emulation {

struct PendingCopy {
  unsigned char* to;
  const unsigned char* from;
  unsigned read_bytes;  // of 16; the others become zero
};

struct CopyQueue {
  static constexpr unsigned kMostCopies = 1024, kMostGroups = 8;
  PendingCopy copies[kMostCopies];
  unsigned count = 0;
  unsigned group_ends[kMostGroups];
  unsigned groups = 0;
};

inline void copy_now(const PendingCopy& copy) {
  for (unsigned i = 0; i < 16; ++i) copy.to[i] = i < copy.read_bytes ? copy.from[i] : 0;
}

// Addresses must be multiples of 16, as on a device.
inline void queue_copy(const PendingCopy& copy) {
  const auto is_aligned = [](const void* at) {
    return reinterpret_cast<std::size_t>(at) % 16 == 0;
  };
  if (!is_aligned(copy.to) || !is_aligned(copy.from)) {
    stop_block("an asynchronous copy is not aligned to 16 bytes");
  }
  CopyQueue& queue = copy_queue();
  if (!schedule().is_copying_late) return copy_now(copy);
  if (queue.count == CopyQueue::kMostCopies) stop_block("more copies than a thread may wait for");
  queue.copies[queue.count++] = copy;
}

inline void commit_group() {
  CopyQueue& queue = copy_queue();
  if (queue.groups == CopyQueue::kMostGroups) stop_block("more groups of copies than are kept");
  queue.group_ends[queue.groups++] = queue.count;
}

// Does all copies but those of the last `left` groups.
inline void finish_groups(unsigned left) {
  CopyQueue& queue = copy_queue();
  if (queue.groups <= left) return;
  const unsigned done = queue.groups - left, end = queue.group_ends[done - 1];
  for (unsigned at = 0; at < end; ++at) copy_now(queue.copies[at]);
  for (unsigned at = end; at < queue.count; ++at) queue.copies[at - end] = queue.copies[at];
  for (unsigned at = done; at < queue.groups; ++at) {
    queue.group_ends[at - done] = queue.group_ends[at] - end;
  }
  queue.count -= end;
  queue.groups = left;
}

}  // namespace aegaeon::emulation

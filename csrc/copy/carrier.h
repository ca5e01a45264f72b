// Who moves the bytes of chunks: host threads here, a device's copy engines in cuda/copies.h.
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#include "copy/queue.h"
#include "copy/ticket.h"

namespace aegaeon::copy {

// Works for one thread of an engine. What `begin` or `end_oldest` throws ends the ticket: by then
// nothing touches its memory on behalf of that chunk. LinkLost ends all tickets, as what `enter`
// throws does.
class Carrier {
 public:
  virtual ~Carrier() = default;

  // Of which directions it takes chunks.
  virtual Lanes lanes() const { return kBothLanes; }
  // How many chunks it may have begun and not ended.
  virtual std::size_t depth() const { return 1; }
  // Called once by its thread, before everything else.
  virtual void enter() {}
  // Begins to copy a chunk. True: its bytes are in, so that a release store after it publishes
  // them. False: end_oldest() will tell.
  virtual bool begin(const Flight& flight) = 0;
  // Waits until the oldest chunk that was begun and not ended is in.
  virtual void end_oldest() {}
};

// Makes the carriers of one engine, which are gone before it is.
class Backend {
 public:
  virtual ~Backend() = default;
  // One for each thread.
  virtual std::vector<std::unique_ptr<Carrier>> make_carriers(unsigned threads) = 0;
  // What a copy that is submitted now must wait for beside other tickets; null where that is
  // nothing. Raises CopyError, LinkLost.
  virtual std::shared_ptr<const Fence> make_fence() { return nullptr; }
};

// Copies `bytes`, so that a release store after it publishes them. `is_long`: the ticket is larger
// than what the cache should see.
using Copier =
    std::function<void(std::byte* to, const std::byte* from, std::size_t bytes, bool is_long)>;

void copy_on_host(std::byte* to, const std::byte* from, std::size_t bytes, bool is_long);

// Threads that copy by `copier`.
std::unique_ptr<Backend> host_backend(Copier copier = copy_on_host);

// Calls `copy(to, from, bytes)` for each piece of the chunk.
template <typename Copy>
void for_each_piece(const Flight& flight, const Copy& copy) {
  const std::vector<Segment>& segments = flight.ticket->segments;
  std::size_t left = flight.bytes;
  for (Cursor at = flight.cursor; left > 0; at = {at.segment + 1, 0}) {
    const Segment& segment = segments[at.segment];
    const std::size_t bytes = std::min(left, segment.bytes - at.offset);
    if (bytes == 0) continue;
    copy(segment.to + at.offset, segment.from + at.offset, bytes);
    left -= bytes;
  }
}

}  // namespace aegaeon::copy

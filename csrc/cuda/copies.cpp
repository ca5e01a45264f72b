#include "cuda/copies.h"

#include <algorithm>
#include <deque>
#include <utility>

#include "copy/errors.h"
#include "copy/host.h"

namespace aegaeon::cuda {
namespace {

using copy::Flight;
using copy::Lanes;
using copy::Segment;

struct ComputeFence final : copy::Fence {
  Event event;
};

bool is_overlapping(const Segment& piece) {
  return piece.from < piece.to + piece.bytes && piece.to < piece.from + piece.bytes;
}

// A chunk that is under way, and what it needs until it is in. Used for one chunk after another.
struct Slot {
  explicit Slot(std::size_t chunk_bytes) : stage(chunk_bytes) {}

  PinnedMemory stage;
  std::size_t staged_bytes = 0;
  std::vector<Segment> to_deliver;  // from the stage, once the chunk is in there
  Event done;
  cudaStream_t stream = nullptr;
};

// What the engine is to know of a device that is lost.
template <typename Step>
void on_link(const Step& step) {
  try {
    step();
  } catch (const Lost& error) {
    throw copy::LinkLost(error.what());
  }
}

class CopyCarrier final : public copy::Carrier {
 public:
  CopyCarrier(std::shared_ptr<const Device> device, std::size_t chunk_bytes, Lanes lanes);
  ~CopyCarrier() override { end_with_device(device_->number()); }

  Lanes lanes() const override { return lanes_; }
  std::size_t depth() const override { return slots_.size(); }
  void enter() override {
    on_link([&] { use_device(device_->number()); });
  }
  bool begin(const Flight& flight) override;
  void end_oldest() override;

 private:
  void issue(const Flight& flight, Slot& slot);
  void issue_piece(Segment piece, Slot& slot, bool is_long);
  void issue_part(const Segment& part, const Reach& target, const Reach& source, Slot& slot,
                  bool is_long);
  void move(const Segment& piece, cudaStream_t stream);
  std::byte* stage_of(Slot& slot, std::size_t bytes);
  void settle(const Slot& slot) const;

  const std::shared_ptr<const Device> device_;
  const Lanes lanes_;
  std::deque<Slot> slots_;
  std::size_t begun_ = 0;
  std::size_t ended_ = 0;
  DeviceMemory scratch_;  // of the one stream on which memory is moved
  // Behind the memory, so that it goes after all that they have been given is done.
  Stream stream_;
  Stream urgent_;
};

CopyCarrier::CopyCarrier(std::shared_ptr<const Device> device, std::size_t chunk_bytes, Lanes lanes)
    : device_(std::move(device)),
      lanes_(lanes),
      scratch_(device_->number(), chunk_bytes),
      urgent_(true) {
  while (slots_.size() < kChunksUnderWay) slots_.emplace_back(chunk_bytes);
}

bool CopyCarrier::begin(const Flight& flight) {
  Slot& slot = slots_[begun_ % slots_.size()];
  slot.staged_bytes = 0;
  slot.to_deliver.clear();
  const bool is_urgent = flight.priority == 0 && !flight.ticket->is_serial;
  slot.stream = (is_urgent ? urgent_ : stream_).handle();
  try {
    on_link([&] { issue(flight, slot); });
  } catch (...) {
    settle(slot);  // of what has been issued
    throw;
  }
  ++begun_;
  return false;
}

void CopyCarrier::issue(const Flight& flight, Slot& slot) {
  if (const auto* fence = static_cast<const ComputeFence*>(flight.ticket->fence.get())) {
    fence->event.hold_back(slot.stream);
  }
  const bool is_long = flight.bytes >= copy::kStreamBytes;
  copy::for_each_piece(flight, [&](std::byte* to, const std::byte* from, std::size_t bytes) {
    issue_piece({to, from, bytes}, slot, is_long);
  });
  slot.done.record(slot.stream);
}

void CopyCarrier::issue_piece(Segment piece, Slot& slot, bool is_long) {
  while (piece.bytes > 0) {
    const Reach target = device_->places().reach(piece.to, piece.bytes);
    const Reach source = device_->places().reach(piece.from, piece.bytes);
    const std::size_t bytes = std::min(target.bytes, source.bytes);
    issue_part({piece.to, piece.from, bytes}, target, source, slot, is_long);
    piece = {piece.to + bytes, piece.from + bytes, piece.bytes - bytes};
  }
}

void CopyCarrier::issue_part(const Segment& part, const Reach& target, const Reach& source,
                             Slot& slot, bool is_long) {
  const auto [to, from, bytes] = part;
  if (target.place == Place::device && source.place == Place::device) {
    move(part, slot.stream);
  } else if (target.place == Place::device) {
    const std::byte* reachable = from;
    if (source.place == Place::pageable) {
      std::byte* const stage = stage_of(slot, bytes);
      copy::copy_on_host(stage, from, bytes, is_long);
      reachable = stage;
    }
    check(cudaMemcpyAsync(to, reachable, bytes, cudaMemcpyHostToDevice, slot.stream),
          "copy to the device");
  } else if (source.place == Place::device) {
    std::byte* reachable = to;
    if (target.place == Place::pageable) {
      reachable = stage_of(slot, bytes);
      slot.to_deliver.push_back({to, reachable, bytes});
    }
    check(cudaMemcpyAsync(reachable, from, bytes, cudaMemcpyDeviceToHost, slot.stream),
          "copy from the device");
  } else {
    throw copy::CopyError("neither end of a copy is in the device's memory");
  }
}

// The driver wants two ranges that are apart: one that moves over itself goes by way of a third.
// Such a ticket is serial and stays on one stream, so that nobody else is at the scratch.
void CopyCarrier::move(const Segment& piece, cudaStream_t stream) {
  const auto [to, from, bytes] = piece;
  const std::byte* source = from;
  if (is_overlapping(piece)) {
    check(cudaMemcpyAsync(scratch_.base(), from, bytes, cudaMemcpyDeviceToDevice, stream),
          "move memory of the device");
    source = scratch_.base();
  }
  check(cudaMemcpyAsync(to, source, bytes, cudaMemcpyDeviceToDevice, stream),
        "move memory of the device");
}

// A chunk has no more bytes than its stage.
std::byte* CopyCarrier::stage_of(Slot& slot, std::size_t bytes) {
  std::byte* const stage = slot.stage.base() + slot.staged_bytes;
  slot.staged_bytes += bytes;
  return stage;
}

void CopyCarrier::end_oldest() {
  Slot& slot = slots_[ended_ % slots_.size()];
  ++ended_;
  try {
    on_link([&] { slot.done.wait(); });
  } catch (...) {
    settle(slot);
    throw;
  }
  for (const Segment& piece : slot.to_deliver) {
    copy::copy_on_host(piece.to, piece.from, piece.bytes, piece.bytes >= copy::kStreamBytes);
  }
}

// After a failure: has the device touch the chunk's memory no more. One that does not answer at all
// is lost, and its context with it.
void CopyCarrier::settle(const Slot& slot) const {
  if (cudaStreamSynchronize(slot.stream) != cudaSuccess) cudaGetLastError();
}

}  // namespace

std::vector<std::unique_ptr<copy::Carrier>> CopyBackend::make_carriers(unsigned) {
  use_device(device_->number());
  std::vector<std::unique_ptr<copy::Carrier>> carriers;
  for (const Lanes lanes : {copy::kInwardLane, copy::kOutwardLane}) {
    carriers.push_back(std::make_unique<CopyCarrier>(device_, chunk_bytes_, lanes));
  }
  return carriers;
}

std::shared_ptr<const copy::Fence> CopyBackend::make_fence() {
  try {
    use_device(device_->number());
    auto fence = std::make_shared<ComputeFence>();
    fence->event.record(device_->compute());
    return fence;
  } catch (const Lost& error) {
    throw copy::LinkLost(error.what());
  } catch (const Error& error) {
    throw copy::CopyError(error.what());
  }
}

}  // namespace aegaeon::cuda

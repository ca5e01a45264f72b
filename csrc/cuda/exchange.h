// The small things that go to a device with each step, and come back: by way of page-locked memory,
// so that nobody waits for a copy but who wants what comes back.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "cuda/device.h"

namespace aegaeon::cuda {

// Uploads that may be under way at once. Where more are sent, the next waits for the first.
constexpr std::size_t kUploadsUnderWay = 4;

// Of one thread at a time, on the stream that computes.
class Exchange {
 public:
  // With room for so many bytes of each upload and download; it grows where more are sent.
  Exchange(std::shared_ptr<const Device> device, std::size_t bytes);
  ~Exchange() { end_with_device(device_->number()); }

  // Has `fill` write `bytes` to memory of ours, and copies them to `target`, behind what the stream
  // was given. Raises Error.
  void send(std::byte* target, std::size_t bytes, const std::function<void(std::byte*)>& fill);
  // Copies `bytes` of the device here and waits for all that the stream was given. What it returns
  // stays until the next call. Raises Error.
  const std::byte* fetch(const std::byte* source, std::size_t bytes);

 private:
  // Page-locked memory, and what it may not be written again before.
  struct Buffer {
    std::optional<PinnedMemory> memory;
    std::size_t bytes = 0;
    Event free;

    std::byte* with_room(std::size_t wanted);
  };

  const std::shared_ptr<const Device> device_;
  std::vector<Buffer> uploads_;
  std::size_t sent_ = 0;
  Buffer download_;
};

}  // namespace aegaeon::cuda

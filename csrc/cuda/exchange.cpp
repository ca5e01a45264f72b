#include "cuda/exchange.h"

#include <utility>

namespace aegaeon::cuda {

// Nothing may be under way there.
std::byte* Exchange::Buffer::with_room(std::size_t wanted) {
  if (wanted > bytes) {
    memory.reset();
    bytes = 0;
    memory.emplace(wanted);
    bytes = wanted;
  }
  return memory->base();
}

Exchange::Exchange(std::shared_ptr<const Device> device, std::size_t bytes)
    : device_(std::move(device)) {
  use_device(device_->number());
  while (uploads_.size() < kUploadsUnderWay) {
    uploads_.emplace_back();
    uploads_.back().with_room(bytes);
  }
  download_.with_room(bytes);
}

void Exchange::send(std::byte* target, std::size_t bytes,
                    const std::function<void(std::byte*)>& fill) {
  use_device(device_->number());
  Buffer& buffer = uploads_[sent_++ % uploads_.size()];
  buffer.free.wait();  // of an event that was never recorded there is nothing to wait for
  std::byte* const from = buffer.with_room(bytes);
  fill(from);
  check(cudaMemcpyAsync(target, from, bytes, cudaMemcpyHostToDevice, device_->compute()),
        "send a step to the device");
  buffer.free.record(device_->compute());
}

const std::byte* Exchange::fetch(const std::byte* source, std::size_t bytes) {
  use_device(device_->number());
  std::byte* const to = download_.with_room(bytes);
  check(cudaMemcpyAsync(to, source, bytes, cudaMemcpyDeviceToHost, device_->compute()),
        "fetch what a step made");
  device_->synchronize();
  return to;
}

}  // namespace aegaeon::cuda

// The CUDA backend of the copy engine: chunks by the device's own copy engines, on streams beside
// the one that computes.
#pragma once

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "copy/carrier.h"
#include "cuda/device.h"

namespace aegaeon::cuda {

// Chunks of a direction that are under way at once: one that is copied, one behind it so that the
// link is never idle, one that is put into the stage. An urgent copy waits for so many.
constexpr std::size_t kChunksUnderWay = 3;

// Page-locked bytes of one engine's stages.
constexpr std::size_t stage_bytes(std::size_t chunk_bytes) {
  return 2 * kChunksUnderWay * chunk_bytes;
}

// Two threads, a direction each, so that what is most urgent goes next. Weights come in on one
// stream, urgent copies (keys and values) on another one, which is not behind what those wait for,
// and all that goes out on a third. A copy starts behind all that the device's compute stream had
// been given when it was submitted, so that none goes over what kernels still use. Host memory that
// is not page-locked goes through stages of kChunksUnderWay chunks.
class CopyBackend final : public copy::Backend {
 public:
  CopyBackend(std::shared_ptr<const Device> device, std::size_t chunk_bytes)
      : device_(std::move(device)), chunk_bytes_(chunk_bytes) {}

  // Raises Error.
  std::vector<std::unique_ptr<copy::Carrier>> make_carriers(unsigned threads) override;
  std::shared_ptr<const copy::Fence> make_fence() override;

 private:
  const std::shared_ptr<const Device> device_;
  const std::size_t chunk_bytes_;
};

}  // namespace aegaeon::cuda

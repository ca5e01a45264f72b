#include "copy/carrier.h"

#include <cstring>
#include <utility>

#include "copy/host.h"

namespace aegaeon::copy {
namespace {

// Pieces of scattered tickets below this are not worth a fence each.
constexpr std::size_t kStreamPieceBytes = 4096;

class HostCarrier final : public Carrier {
 public:
  explicit HostCarrier(const Copier& copier) : copier_(copier) {}

  bool begin(const Flight& flight) override {
    const bool is_long = flight.ticket->total_bytes >= kStreamBytes;
    for_each_piece(flight, [&](std::byte* to, const std::byte* from, std::size_t bytes) {
      copier_(to, from, bytes, is_long);
    });
    return true;
  }

 private:
  const Copier& copier_;
};

class HostBackend final : public Backend {
 public:
  explicit HostBackend(Copier copier) : copier_(std::move(copier)) {}

  std::vector<std::unique_ptr<Carrier>> make_carriers(unsigned threads) override {
    std::vector<std::unique_ptr<Carrier>> carriers;
    while (carriers.size() < threads) carriers.push_back(std::make_unique<HostCarrier>(copier_));
    return carriers;
  }

 private:
  const Copier copier_;
};

}  // namespace

void copy_on_host(std::byte* to, const std::byte* from, std::size_t bytes, bool is_long) {
  if (from < to + bytes && to < from + bytes) {
    std::memmove(to, from, bytes);
  } else if (is_long && bytes >= kStreamPieceBytes) {
    copy_streaming(to, from, bytes);
  } else {
    copy_cached(to, from, bytes);
  }
}

std::unique_ptr<Backend> host_backend(Copier copier) {
  return std::make_unique<HostBackend>(std::move(copier));
}

}  // namespace aegaeon::copy

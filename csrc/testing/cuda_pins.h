// What a CUDA device may read of the host without a stage: how that is locked, in pieces, and what
// a refusal leaves. Part of `cuda_copies`.
#pragma once

#include <sys/mman.h>

#include <cstring>
#include <string>

#include "testing/cuda_bench.h"

namespace cuda_bench {

// As the weight cache has its models: others write them.
struct Mapping {
  Mapping(std::size_t size_bytes, int modes)
      : base(static_cast<std::byte*>(
            mmap(nullptr, size_bytes, modes, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))),
        bytes(size_bytes) {
    require(base != MAP_FAILED, "no mapping");
  }
  ~Mapping() { munmap(base, bytes); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  std::byte* const base;
  const std::size_t bytes;
};

inline void copy_whole(Bench& bench, const Mapping& host) {
  const std::size_t bytes = std::min(host.bytes, bench.memory.bytes());
  require(bench.wait(bench.submit(bench.memory.base(), host.base, bytes)), "a copy starved");
  require(std::memcmp(bench.memory.base(), host.base, bytes) == 0, "a copy is wrong");
}

// Where the device does not know how, or nobody says that it is so, that is told and copies go
// through a stage.
inline void memory_that_is_only_read_is_locked_too() {
  const Mapping host(16 * kChunk, PROT_READ);
  Bench bench;
  require(bench.pin(host.base, host.bytes, false).find("refuses") != std::string::npos,
          "memory that is only read was locked to be written");
  copy_whole(bench, host);
  require(bench.pin(host.base, host.bytes, true).empty(), "memory that is only read is not locked");
  require(!bench.pin(host.base + kChunk, kChunk, true).empty(), "it was locked twice");
  copy_whole(bench, host);
  bench.unpin(host.base);
  cudart::lock_read_only(false);
  require(bench.pin(host.base, host.bytes, true).find("read-only") != std::string::npos,
          "it was not told what the driver lacks");
  copy_whole(bench, host);
  cudart::lock_read_only(false, true);
  require(bench.pin(host.base, host.bytes, true).empty(), "a flag was given for nothing");
  copy_whole(bench, host);
}

// More than one piece, with a copy over the border; a refusal or a change of mind undoes them all.
inline void much_memory_is_locked_piece_by_piece() {
  const Mapping host(2 * cuda::kPinPieceBytes + 3 * kChunk, PROT_READ | PROT_WRITE);
  std::byte* const border = host.base + cuda::kPinPieceBytes - kBytes / 2;
  for (std::size_t at = 0; at < kBytes; ++at) border[at] = pattern(9, at);
  Bench bench;
  bench.wait_for_threads();
  const std::size_t before = cudart::left_over();
  for (std::uint64_t piece = 0; piece < 3; ++piece) {
    cudart::fail_call(3 + piece);  // behind two calls that ask for the device
    require(!bench.pin(host.base, host.bytes).empty(), "a refusal was not told");
    require(cudart::left_over() == before, "a piece stays locked");
    std::uint64_t asked = 0;
    const auto is_wanted = [&] { return asked++ < piece; };
    require(!bench.pin(host.base, host.bytes, false, is_wanted).empty(), "it was not interrupted");
    require(cudart::left_over() == before, "a piece stays locked");
  }
  require(bench.pin(host.base, host.bytes).empty(), "memory is not locked");
  require(cudart::left_over() == before + 3, "it is not locked in pieces");
  require(bench.wait(bench.submit(bench.memory.base(), border, kBytes)), "a copy starved");
  bench.check(bench.memory.base(), 9);
  bench.write(bench.memory.base(), 10);
  require(bench.wait(bench.submit(border, bench.memory.base(), kBytes, 1, true)), "starved");
  bench.finish("a copy over a border is wrong");
  require(std::memcmp(border, filled(10).data(), kBytes) == 0, "a copy out over a border is wrong");
  bench.unpin(host.base);
  require(cudart::left_over() == before, "a piece stays locked");
}

}  // namespace cuda_bench

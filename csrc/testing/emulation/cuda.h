// The part of CUDA C++ that our kernels are written in, for a plain C++ compiler: included instead
// of what nvcc has built in (csrc/ops/cuda/compiler.h). Names are CUDA's.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "testing/emulation/block.h"
#include "testing/emulation/copies.h"
#include "testing/emulation/half.h"
#include "testing/emulation/warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::aegaeon::emulation::thread_index())
#define blockIdx (::aegaeon::emulation::block_index())
#define blockDim (::aegaeon::emulation::block_extent())
#define gridDim (::aegaeon::emulation::grid_extent())

struct CUstream_st;

inline void __syncthreads() { ::aegaeon::emulation::sync_block(false); }
inline int __syncthreads_or(int claim) { return ::aegaeon::emulation::sync_block(claim != 0); }

inline void __syncwarp() {
  ::aegaeon::emulation::meet(::aegaeon::emulation::Meeting::sync, nullptr, 0);
}

namespace aegaeon::emulation {

// What lane `from` gave as `value`.
template <typename T, typename From>
T exchange(std::uint32_t mask, T value, const From& from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if (mask != 0xFFFFFFFFU) stop_block("a shuffle of some lanes only");
  std::uint32_t words[2] = {};
  std::memcpy(words, &value, sizeof value);
  const Given given = meet(Meeting::shuffle, words, sizeof(T) / 4);
  std::memcpy(&value, given[from(lane_index()) % kWarpLanes], sizeof value);
  return value;
}

// Runs the kernel on the CPU, to its end.
template <typename Arguments>
void launch(void (*kernel)(Arguments), Launch extents, const Arguments& arguments) {
  auto body = [&] { kernel(arguments); };
  extents.body = [](void* context) { (*static_cast<decltype(body)*>(context))(); };
  extents.context = &body;
  run(extents);
}

}  // namespace aegaeon::emulation

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  return ::aegaeon::emulation::exchange(
      mask, value, [&](unsigned lane) { return lane ^ static_cast<unsigned>(other); });
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  return ::aegaeon::emulation::exchange(mask, value,
                                        [&](unsigned) { return static_cast<unsigned>(from); });
}

// Of a lane that has none so far below: its own.
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned below) {
  return ::aegaeon::emulation::exchange(
      mask, value, [&](unsigned lane) { return lane < below ? lane : lane - below; });
}

inline unsigned __ballot_sync(unsigned mask, int claim) {
  if (mask != 0xFFFFFFFFU) ::aegaeon::emulation::stop_block("a vote of some lanes only");
  const std::uint32_t own = claim != 0 ? 1 : 0;
  const auto given = ::aegaeon::emulation::meet(::aegaeon::emulation::Meeting::vote, &own, 1);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) votes |= given[lane][0] << lane;
  return votes;
}

template <typename T>
T atomicAdd(T* place, T value) {
  static_assert(std::is_integral_v<T>, "sums of floats depend on their order");
  return __atomic_fetch_add(place, value, __ATOMIC_RELAXED);
}

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

using std::exp2f;
using std::fmaxf;
using std::max;
using std::min;

namespace aegaeon::ops::cuda {

template <typename T>
T& block_memory() {
  return *static_cast<T*>(::aegaeon::emulation::shared_memory());
}

struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

inline float widen(float value) { return value; }
inline float widen(Bf16 value) { return ::aegaeon::emulation::widen_bf16(value.bits); }
inline float widen(F16 value) { return ::aegaeon::emulation::widen_f16(value.bits); }
inline void narrow(float value, float& to) { to = value; }
inline void narrow(float value, Bf16& to) { to = {::aegaeon::emulation::narrow_bf16(value)}; }
inline void narrow(float value, F16& to) { to = {::aegaeon::emulation::narrow_f16(value)}; }

inline void copy_async(void* to, const void* from, bool is_there) {
  ::aegaeon::emulation::queue_copy({static_cast<unsigned char*>(to),
                                    static_cast<const unsigned char*>(from), is_there ? 16U : 0U});
}

inline void commit_copies() { ::aegaeon::emulation::commit_group(); }

template <unsigned left>
void wait_copies() {
  ::aegaeon::emulation::finish_groups(left);
}

template <bool is_transposed>
void load_matrices(std::uint32_t (&out)[4], const void* row) {
  std::uint32_t own[4];
  std::memcpy(own, row, sizeof own);
  ::aegaeon::emulation::distribute_matrices(out, own, is_transposed);
}

inline void multiply_matrices(float (&d)[4], const std::uint32_t (&a)[4],
                              const std::uint32_t (&b)[2], Bf16) {
  ::aegaeon::emulation::multiply_16x8x16(d, a, b, true);
}

inline void multiply_matrices(float (&d)[4], const std::uint32_t (&a)[4],
                              const std::uint32_t (&b)[2], F16) {
  ::aegaeon::emulation::multiply_16x8x16(d, a, b, false);
}

inline std::uint32_t bits_of_float(float value) { return ::aegaeon::emulation::bits_of(value); }
inline float float_of_bits(std::uint32_t bits) { return ::aegaeon::emulation::float_of(bits); }

inline std::uint64_t bits_of_double(double value) {
  std::uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline double double_of(std::uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void keep_loads_behind() {}

struct Extents {
  ::aegaeon::emulation::Extent grid;
  unsigned threads;
  std::size_t shared_bytes;
};

template <typename Arguments>
void launch(void (*kernel)(Arguments), const Extents& extents, CUstream_st* stream,
            const Arguments& arguments) {
  const auto run = [kernel, extents, arguments] {
    ::aegaeon::emulation::launch(
        kernel, {extents.grid, {extents.threads, 1, 1}, extents.shared_bytes, nullptr, nullptr},
        arguments);
  };
  const auto queue = ::aegaeon::emulation::stream_queue();
  if (stream == nullptr || queue == nullptr) return run();
  queue(stream, run);
}

}  // namespace aegaeon::ops::cuda

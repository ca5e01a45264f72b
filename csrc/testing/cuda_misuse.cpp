// Kernels that do what CUDA leaves undefined, each in its own way, the half types of the emulation,
// and what stands around launches: functions that tests call from Python.

#include <cstdint>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "ops/cuda/allowance.h"
#include "ops/cuda/compiler.h"

namespace {

namespace cuda = aegaeon::ops::cuda;

enum class Misuse : int {
  none,
  return_before_barrier,
  barrier_after_return,
  unlike_meetings,
  shuffle_of_some,
  copy_of_unaligned,
  copy_without_wait,
};

struct Arguments {
  Misuse misuse;
  unsigned char* bytes;  // 64, aligned to 16
};

__global__ void misuse_kernel(const Arguments arguments) {
  auto& memory = cuda::block_memory<unsigned char[64]>();
  const bool is_first = threadIdx.x == 0, is_low = threadIdx.x < 32;
  const bool is_last = threadIdx.x + 1 == blockDim.x;
  switch (arguments.misuse) {
    case Misuse::none:
      __syncthreads();
      break;
    case Misuse::return_before_barrier:
      if (!is_last) __syncthreads();
      break;
    case Misuse::barrier_after_return:
      if (is_low) return;
      __syncwarp();
      __syncthreads();
      break;
    case Misuse::unlike_meetings:
      if (threadIdx.x % 2 == 0) __syncwarp();
      __shfl_xor_sync(0xFFFFFFFFU, 1.0F, 1);
      break;
    case Misuse::shuffle_of_some:
      __shfl_xor_sync(0x0000FFFFU, 1.0F, 1);
      break;
    case Misuse::copy_of_unaligned:
      if (is_first) cuda::copy_async(memory, arguments.bytes + 8, true);
      break;
    case Misuse::copy_without_wait:
      if (is_first) cuda::copy_async(memory, arguments.bytes, true);
      break;
  }
}

}  // namespace

extern "C" {

// Returns what the emulation has against it; empty where nothing.
const char* misuse(int kind, unsigned threads, std::size_t shared_bytes) {
  static std::string said;
  said.clear();
  alignas(16) unsigned char bytes[64] = {};
  try {
    cuda::launch(&misuse_kernel, {{1, 1, 1}, threads, shared_bytes}, nullptr,
                 Arguments{static_cast<Misuse>(kind), bytes});
  } catch (const std::exception& error) {
    said = error.what();
  }
  return said.c_str();
}

// Narrows floats to bf16 or f16, and widens those again.
void round_halves(const float* from, std::int64_t count, int is_bf16, std::uint16_t* halves,
                  float* widened) {
  for (std::int64_t at = 0; at < count; ++at) {
    if (is_bf16 != 0) {
      cuda::Bf16 half;
      cuda::narrow(from[at], half);
      halves[at] = half.bits;
      widened[at] = cuda::widen(half);
    } else {
      cuda::F16 half;
      cuda::narrow(from[at], half);
      halves[at] = half.bits;
      widened[at] = cuda::widen(half);
    }
  }
}

// Asks for `count` allowances, each (device, kernel, bytes, whether it is refused), one after
// another; sets in `told` which of them the driver was asked for.
void ask_allowances(const std::int64_t* asked, std::int64_t count, std::int64_t* told) {
  cuda::Allowance allowance;
  for (std::int64_t at = 0; at < count; ++at) {
    const std::int64_t* const one = asked + 4 * at;
    told[at] = 0;
    const auto allow = [&] {
      told[at] = 1;
      if (one[3] != 0) throw std::runtime_error("refused");
    };
    try {
      allowance.at_least(static_cast<int>(one[0]), reinterpret_cast<const void*>(one[1]),
                         static_cast<std::size_t>(one[2]), allow);
    } catch (const std::runtime_error&) {
      told[at] = 2;
    }
  }
}

}  // extern "C"

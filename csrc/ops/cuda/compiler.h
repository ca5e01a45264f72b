// One source for two compilers: nvcc, or a plain one on the emulation of csrc/testing. All that
// kernels use beside CUDA's own names stands here, and nothing else asks which compiler it is.
#pragma once

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/errors.h"
#include "cuda/sticky.h"
#include "ops/cuda/allowance.h"

namespace aegaeon::ops::cuda {

using Bf16 = __nv_bfloat16;
using F16 = __half;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(Bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(F16 value) { return __half2float(value); }
__device__ __forceinline__ void narrow(float value, float& to) { to = value; }
__device__ __forceinline__ void narrow(float value, Bf16& to) { to = __float2bfloat16_rn(value); }
__device__ __forceinline__ void narrow(float value, F16& to) { to = __float2half_rn(value); }

// The block's shared memory, of as many bytes as it was launched with.
template <typename T>
__device__ __forceinline__ T& block_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return *reinterpret_cast<T*>(memory);
}

__device__ __forceinline__ unsigned shared_address(const void* place) {
  return static_cast<unsigned>(__cvta_generic_to_shared(place));
}

// Copies 16 bytes to shared memory, past the registers; of nothing that is there, zeros. What was
// issued by then is a group once it is committed.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool is_there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(is_there ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for this thread's groups but the last `left`; other threads' need a barrier after it.
template <int left>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// Loads four matrices of 8 x 8 halves: lane i names row i % 8 of matrix i / 8, 16 bytes.
template <bool is_transposed>
__device__ __forceinline__ void load_matrices(std::uint32_t (&out)[4], const void* row) {
  const unsigned from = shared_address(row);
  if constexpr (is_transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
  }
}

// d += a * b on the tensor cores, 16 x 8 results of 16 products each.
__device__ __forceinline__ void multiply_matrices(float (&d)[4], const std::uint32_t (&a)[4],
                                                  const std::uint32_t (&b)[2], Bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply_matrices(float (&d)[4], const std::uint32_t (&a)[4],
                                                  const std::uint32_t (&b)[2], F16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ unsigned bits_of_float(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float float_of_bits(unsigned bits) { return __uint_as_float(bits); }
__device__ __forceinline__ std::uint64_t bits_of_double(double value) {
  return static_cast<std::uint64_t>(__double_as_longlong(value));
}
__device__ __forceinline__ double double_of(std::uint64_t bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}

// The compiler moves no load from behind this to before it.
__device__ __forceinline__ void keep_loads_behind() { asm volatile("" ::: "memory"); }

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  const std::string said =
      std::string(what) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
  if (aegaeon::cuda::is_sticky(error)) throw aegaeon::cuda::Lost(said);
  throw aegaeon::cuda::Error(said);
}

struct Extents {
  dim3 grid;
  unsigned threads;
  std::size_t shared_bytes;
};

// Has the current device allow the kernel so many bytes.
template <typename Arguments>
void allow_shared(void (*kernel)(Arguments), std::size_t bytes) {
  static Allowance allowance;  // the driver's state, which is the process's as well
  int device = 0;
  check(cudaGetDevice(&device), "no device is current");
  allowance.at_least(device, reinterpret_cast<const void*>(kernel), bytes, [&] {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes)),
          "a kernel does not get its shared memory");
  });
}

// Launches on the stream. Throws cuda::Error where the device refuses.
template <typename Arguments>
void launch(void (*kernel)(Arguments), const Extents& extents, CUstream_st* stream,
            const Arguments& arguments) {
  constexpr std::size_t kUnasked = 48 << 10;  // what a block may have without being allowed more
  if (extents.shared_bytes > kUnasked) allow_shared(kernel, extents.shared_bytes);
  kernel<<<extents.grid, extents.threads, extents.shared_bytes, stream>>>(arguments);
  check(cudaGetLastError(), "a kernel was not launched");
}

}  // namespace aegaeon::ops::cuda

#else

#include "testing/emulation/cuda.h"

#endif

// silu_mul and embed: a thread for each element.

#include "ops/cuda/compiler.h"
#include "ops/cuda/ops.h"

namespace aegaeon::ops::cuda {
namespace {

constexpr std::size_t kElementThreads = 256;

template <typename Params>
void launch_elements(Stream stream, void (*kernel)(Params), std::size_t elements,
                     const Params& params) {
  if (elements == 0) return;
  const std::size_t blocks = (elements + kElementThreads - 1) / kElementThreads;
  launch(kernel, {{static_cast<unsigned>(blocks), 1, 1}, kElementThreads, 0}, stream, params);
}

__device__ __forceinline__ std::size_t element_index() {
  return blockIdx.x * kElementThreads + threadIdx.x;
}

__global__ void __launch_bounds__(kElementThreads) silu_mul_elements(const SiluMulParams params) {
  const std::size_t at = element_index();
  if (at >= params.rows * params.features) return;
  const std::size_t row = at / params.features, i = at % params.features;
  const float gate = params.gate.first[row * params.gate.stride + i];
  const float up = params.up.first[row * params.up.stride + i];
  params.out[at] = gate / (1.0F + expf(-gate)) * up;
}

// Element k of output `id` of the tiles (ops/ops.h).
template <typename T>
struct Tiles {
  static __device__ __forceinline__ float at(const EmbedParams& params, std::size_t id,
                                             std::size_t k) {
    const std::size_t line = id / kTileOutputs * params.in_features + k;
    const T* const tiles = static_cast<const T*>(params.table.tiles);
    return widen(tiles[line * kTileOutputs + id % kTileOutputs]);
  }
};

struct Quantized {};

template <>
struct Tiles<Quantized> {
  static __device__ __forceinline__ float at(const EmbedParams& params, std::size_t id,
                                             std::size_t k) {
    constexpr std::size_t kLine = 2 * kTileOutputs, kGroup = (1 + kGroupInputs / 2) * kLine;
    const std::size_t inputs = params.in_features;
    const std::size_t lines = (inputs + kGroupInputs - 1) / kGroupInputs + (inputs + 1) / 2;
    const std::size_t output = id % kTileOutputs;
    const signed char* const group = static_cast<const signed char*>(params.table.tiles) +
                                     id / kTileOutputs * lines * kLine + k / kGroupInputs * kGroup;
    const float scale = widen(reinterpret_cast<const Bf16*>(group)[output]);
    const signed char* const line = group + (1 + k % kGroupInputs / 2) * kLine;
    return static_cast<float>(line[2 * output + k % 2]) * scale;
  }
};

template <typename T>
__global__ void __launch_bounds__(kElementThreads) embed_elements(const EmbedParams params) {
  const std::size_t at = element_index();
  if (at >= params.rows * params.in_features) return;
  const std::int64_t id = params.token_ids[at / params.in_features];
  const bool is_there = id >= 0 && static_cast<std::size_t>(id) < params.table.out_features;
  params.out[at] =
      is_there ? Tiles<T>::at(params, static_cast<std::size_t>(id), at % params.in_features) : NAN;
}

}  // namespace

void silu_mul(Stream stream, const SiluMulParams& params) {
  launch_elements(stream, &silu_mul_elements, params.rows * params.features, params);
}

void embed(Stream stream, const EmbedParams& params) {
  const std::size_t elements = params.rows * params.in_features;
  switch (params.table.type) {
    case WeightType::f32:
      return launch_elements(stream, &embed_elements<float>, elements, params);
    case WeightType::bf16:
      return launch_elements(stream, &embed_elements<Bf16>, elements, params);
    case WeightType::f16:
      return launch_elements(stream, &embed_elements<F16>, elements, params);
    case WeightType::i8:
      return launch_elements(stream, &embed_elements<Quantized>, elements, params);
  }
}

}  // namespace aegaeon::ops::cuda

// silu_mul, finish_product and embed: a thread for each element.

#include <cmath>
#include <stdexcept>

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
  float gate = params.gate.first[row * params.gate.stride + i];
  float up = params.up.first[row * params.up.stride + i];
  if (params.scales != nullptr) {
    gate *= params.scales[row];
    up *= params.scales[row];
  }
  if (params.gate_bias != nullptr) gate += params.gate_bias[i];
  if (params.up_bias != nullptr) up += params.up_bias[i];
  const float made = gate / (1.0F + expf(-gate)) * up;
  if (params.rounded == nullptr) {
    params.out[at] = made;
  } else {
    narrow(made, static_cast<Bf16*>(params.rounded)[at]);
  }
}

__global__ void __launch_bounds__(kElementThreads) finish_elements(const FinishParams params) {
  const std::size_t at = element_index();
  if (at >= params.rows * params.features) return;
  const std::size_t row = at / params.features, column = at % params.features;
  float value = params.out[at];
  if (params.scales != nullptr) value *= params.scales[row];
  std::size_t first = 0;
#pragma unroll
  for (std::size_t part = 0; part < kMostParts; ++part) {
    const float* const bias = params.biases[part];
    if (bias != nullptr && column >= first && column < params.ends[part]) {
      value += bias[column - first];
    }
    first = params.ends[part];
  }
  if (params.residual != nullptr) value += params.residual[at];
  params.out[at] = value;
}

template <typename T>
__global__ void __launch_bounds__(kElementThreads) embed_elements(const EmbedParams params) {
  const std::size_t at = element_index();
  if (at >= params.rows * params.in_features) return;
  const std::int64_t id = params.token_ids[at / params.in_features];
  const bool is_there = id >= 0 && static_cast<std::size_t>(id) < params.table.out_features;
  const T* const row = static_cast<const T*>(params.table.tiles) +
                       id * static_cast<std::int64_t>(params.in_features);
  params.out[at] = is_there ? widen(row[at % params.in_features]) : NAN;
}

}  // namespace

void silu_mul(Stream stream, const SiluMulParams& params) {
  launch_elements(stream, &silu_mul_elements, params.rows * params.features, params);
}

void finish_product(Stream stream, const FinishParams& params) {
  launch_elements(stream, &finish_elements, params.rows * params.features, params);
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
      throw std::invalid_argument("no kernel embeds int8; load the table as bf16");
  }
}

}  // namespace aegaeon::ops::cuda

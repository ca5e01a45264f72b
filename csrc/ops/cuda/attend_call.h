// One call of `attend` as its kernels see it: where queries, pages and results lie, and how queries
// and a step of keys and values come into shared memory.
#pragma once

#include "ops/cuda/attend_tile.h"
#include "ops/cuda/tables.h"

namespace aegaeon::ops::cuda {

// Pages of one layer: of block b and KV head h the keys are page b + first_page + h, the values
// kv_heads pages behind. All pages are [16 tokens][head_dim]: a token's row is what is written and
// read in one piece, by 16 bytes a thread. (Of keys, the CPU has the transposed.)
struct LayerPages {
  void* pages;
  std::size_t first_page;
  std::size_t kv_heads;
};

struct AttendCall {
  const AttendTile* short_tiles;
  const AttendTile* long_tiles;
  const std::int32_t* blocks;
  std::size_t short_queries;
  std::size_t splits;
  float* workspace;
  LayerPages kv;
  int heads;
  int group;    // heads that share a KV head
  float scale;  // times log2(e)
  const float* queries;
  float* out;
};

// A tile of one KV head.
struct TileOfHead {
  const AttendCall& call;
  const AttendTile& tile;
  int kv_head;

  __device__ __forceinline__ int tokens() const { return tile.start + tile.rows; }
  __device__ __forceinline__ int queries() const { return tile.rows * call.group; }

  // Tokens that a query of the tile may see; none where there is no such query.
  __device__ __forceinline__ int seen(int query) const {
    const int at = tile.first_query + query;
    return at < queries() ? tile.start + at / call.group + 1 : 0;
  }

  // Tokens that any of so many queries may see.
  __device__ __forceinline__ int seen_by_all(int count) const {
    const int last = tile.first_query + count;
    return tile.start + ((last < queries() ? last : queries()) - 1) / call.group + 1;
  }

  // Where a query lies among queries and results.
  __device__ __forceinline__ std::size_t home(int query, int head_dim) const {
    const int at = tile.first_query + query;
    const std::size_t row = static_cast<std::size_t>(tile.first_row + at / call.group);
    const int head = kv_head * call.group + at % call.group;
    return (row * static_cast<std::size_t>(call.heads) + static_cast<std::size_t>(head)) *
           static_cast<std::size_t>(head_dim);
  }
};

// Brings `count` queries to shared memory, as what keys are; zeros where there is none.
template <typename T, int head_dim>
__device__ __forceinline__ void load_queries(const TileOfHead& at, int count, T* queries) {
  using L = Layout<T, head_dim>;
  const int threads = static_cast<int>(blockDim.x);
  constexpr int kPacks = head_dim / 4;
  for (int i = static_cast<int>(threadIdx.x); i < count * kPacks; i += threads) {
    const int query = i / kPacks, element = i % kPacks * 4;
    Pack<float, 4> given = {};
    if (at.seen(query) > 0) {
      given = load_floats<4>(at.call.queries + at.home(query, head_dim) + element);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) narrow(given.of[j], queries[query * L::kRow + element + j]);
  }
}

// Begins to copy the step of tokens from `first` on; zeros for those that the sequence has not.
template <typename T, int head_dim>
__device__ __forceinline__ void fetch_step(const TileOfHead& at, int first, T* keys, T* values) {
  using L = Layout<T, head_dim>;
  const int threads = static_cast<int>(blockDim.x);
  constexpr int kChunks = head_dim / L::kChunk;
  constexpr int kBlock = static_cast<int>(kBlockTokens), kBlocks = L::kStep / kBlock;
  const LayerPages& kv = at.call.kv;
  const std::size_t page = kv.first_page + static_cast<std::size_t>(at.kv_head);
  // All blocks' ids first: nobody waits for one between two copies.
  std::int32_t ids[kBlocks];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const int position = first + block * kBlock;
    ids[block] = 0;
    if (position < at.tokens()) {
      ids[block] = at.call.blocks[at.tile.first_block + position / kBlock];
    }
  }
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const std::size_t row = (static_cast<std::size_t>(ids[block]) + page) * kBlockTokens;
    const T* const keys_page = static_cast<const T*>(kv.pages) + row * head_dim;
    const T* const values_page = keys_page + kv.kv_heads * kBlockTokens * head_dim;
    for (int i = static_cast<int>(threadIdx.x); i < kBlock * kChunks; i += threads) {
      const int token = i / kChunks, element = i % kChunks * L::kChunk;
      const bool is_there = first + block * kBlock + token < at.tokens();
      const int from = token * head_dim + element;
      const int to = (block * kBlock + token) * L::kRow + element;
      copy_async(keys + to, keys_page + from, is_there);
      copy_async(values + to, values_page + from, is_there);
    }
  }
}

// Where some rows of a tile must not see tokens that others see, weights of zero hide their values,
// unless those are no numbers: such are made zero, and their tokens noted. All threads must come;
// returns whether there are any.
template <typename T, int head_dim>
__device__ bool hide_poison(T* values, int first_hidden, unsigned char* poisoned) {
  using L = Layout<T, head_dim>;
  const int threads = static_cast<int>(blockDim.x);
  constexpr int kElements = L::kStep * head_dim;
  const auto is_poison = [](T value) {
    const float wide = widen(value);
    return !(wide - wide == 0.0F);
  };
  bool has_any = false;
  for (int i = static_cast<int>(threadIdx.x); i < kElements; i += threads) {
    has_any |=
        i / head_dim >= first_hidden && is_poison(values[i / head_dim * L::kRow + i % head_dim]);
  }
  if (__syncthreads_or(has_any ? 1 : 0) == 0) return false;
  for (int token = static_cast<int>(threadIdx.x); token < L::kStep; token += threads) {
    poisoned[token] = 0;
    for (int i = 0; i < head_dim && token >= first_hidden; ++i) {
      T& value = values[token * L::kRow + i];
      if (!is_poison(value)) continue;
      narrow(0.0F, value);
      poisoned[token] = 1;
    }
  }
  __syncthreads();
  return true;
}

}  // namespace aegaeon::ops::cuda

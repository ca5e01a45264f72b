// The inner loops of `attend`, for any vector type: a tile of queries over one split of a sequence.
#pragma once

#include <cfloat>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "ops/cpu/exp.h"
#include "ops/cpu/unroll.h"
#include "ops/ops.h"

namespace aegaeon::ops {

// Tokens of a split: its scores, of all a tile's queries, stay in the first cache, its keys and
// values in the second one.
constexpr std::size_t kSplitTokens = 512;
constexpr std::size_t kSplitBlocks = kSplitTokens / kBlockTokens;
constexpr std::size_t kMaxTileQueries = 12;
// Pages that are read side by side at most, and how many of them reading is fetched ahead of.
constexpr std::size_t kMaxPages = 4;
// Bytes of values that elements pass over one after another: they stay in the first cache.
constexpr std::size_t kStayingBytes = 8 << 10;
// From a query's scores to the next one's: not a multiple of what the first cache is wide.
constexpr std::size_t kScoreStride = kSplitTokens + kBlockTokens;

// The largest score of a query, and the sum of its weights, exp(score - high).
struct Softmax {
  float high = -FLT_MAX;  // finite: it is subtracted even where nothing is seen
  float total = 0.0F;
};

struct SplitTile {
  std::size_t head_dim;
  std::size_t count;
  const float* queries;                  // [head_dim][count], scaled
  std::size_t visible[kMaxTileQueries];  // tokens that a query may see of the split, ascending
  // The pages in the order in which they are read: of keys, of values (as many as the last query
  // sees of either), and kMaxPages of what will be read after them.
  const char* pages[2 * kSplitBlocks + kMaxPages];
  float* scores;                     // [count][kScoreStride], for the kernel's own use
  float* sums;                       // [count][head_dim]: the results, values times weights
  Softmax softmax[kMaxTileQueries];  // and their weights'
};

// Static, as is all here that is no template of V: files for other processors have their own.
static inline std::size_t blocks_of(const SplitTile& tile) {
  return (tile.visible[tile.count - 1] + kBlockTokens - 1) / kBlockTokens;
}

struct AttentionKernel {
  std::size_t max_queries;
  void (*run)(SplitTile& tile);
};

// Kernels by instruction set; those that the compiler's target lacks are not there.
AttentionKernel baseline_attention(KvType type);
AttentionKernel avx2_attention(KvType type);
AttentionKernel avx512_attention(KvType type);

// Below, `V` names a vector type and its operations (vectors_*.h), how many queries its registers
// have room for, and how many at most of them fetch ahead.

constexpr std::size_t bytes_of(KvType type) { return type == KvType::f32 ? 4 : 2; }

// How many things that take `each` of `room` are taken together: 1, 2 or 4.
constexpr std::size_t together(std::size_t room, std::size_t each) {
  return room >= 4 * each ? 4 : room >= 2 * each ? 2 : 1;
}

// Into the second cache. Tiles of many queries compute for longer than the processor's own fetching
// takes, and do without.
template <typename V, std::size_t queries>
[[gnu::always_inline]] inline void fetch(const char* line) {
  if constexpr (queries <= V::kFetchingQueries) __builtin_prefetch(line, 0, 2);
}

template <typename V>
void fill(float* from, const float* end, float value) {
  for (; from != end; ++from) *from = value;
}

// Element `index` of what lies at `from`.
template <typename V, KvType type>
float element(const char* from, std::size_t index) {
  std::uint32_t bits = 0;
  if constexpr (type == KvType::f32) {
    std::memcpy(&bits, from + index * 4, 4);
  } else {
    std::uint16_t half;
    std::memcpy(&half, from + index * 2, 2);
    bits = static_cast<std::uint32_t>(half) << 16;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Two vectors of what lies at `from`: of bf16 the even elements and the odd ones, which
// V::interleave(low, high) puts in order.
template <typename V, KvType type>
[[gnu::always_inline]] inline void load_pair(const char* from, typename V::Vector& low,
                                             typename V::Vector& high) {
  if constexpr (type == KvType::bf16) {
    V::load_bf16(from, low, high);
  } else {
    low = V::load(reinterpret_cast<const float*>(from));
    high = V::load(reinterpret_cast<const float*>(from) + V::kWidth);
  }
}

// sums[query][vector] += loaded[vector] * x[query].
template <typename V, std::size_t queries, std::size_t vectors>
[[gnu::always_inline]] inline void add_products(const typename V::Vector* loaded, const float* x,
                                                typename V::Vector* sums) {
  unroll<queries>([&](auto q) {
    const typename V::Vector factor = V::broadcast(x + q.at);
    unroll<vectors>([&](auto v) {
      constexpr std::size_t at = q.at * vectors + v.at;
      sums[at] = V::multiply_add(loaded[v.at], factor, sums[at]);
    });
  });
}

// A line of each page, `offset` bytes from its beginning: of bf16 two dimensions, low and high.
template <typename V, KvType type, std::size_t queries, std::size_t pages>
[[gnu::always_inline]] inline void load_lines(const char* const* page, std::size_t offset,
                                              typename V::Vector* low, typename V::Vector* high) {
  constexpr std::size_t each = kBlockTokens / V::kWidth, vector_bytes = V::kWidth * sizeof(float);
  unroll<pages * each>([&](auto v) {
    const char* const from = page[v.at / each] + offset + v.at % each * vector_bytes;
    if constexpr (v.at % each == 0) fetch<V, queries>(page[v.at / each + kMaxPages] + offset);
    if constexpr (type == KvType::f32) {
      low[v.at] = V::load(reinterpret_cast<const float*>(from));
    } else {
      load_pair<V, type>(from, low[v.at], high[v.at]);
    }
  });
}

// Of bf16, the last one of an odd number of dimensions.
template <typename V, std::size_t pages>
void load_odd_line(const char* const* page, std::size_t offset, typename V::Vector* line) {
  constexpr std::size_t each = kBlockTokens / V::kWidth;
  unroll<pages * each>([&](auto v) {
    float floats[V::kWidth];
    for (std::size_t j = 0; j < V::kWidth; ++j) {
      const std::size_t token = v.at % each * V::kWidth + j;
      floats[j] = element<V, KvType::bf16>(page[v.at / each] + offset, token);
    }
    line[v.at] = V::load(floats);
  });
}

// Scores of all queries with the tokens of so many pages, each a chain over head_dim from zero.
template <typename V, KvType type, std::size_t queries, std::size_t pages>
void score_pages(const SplitTile& tile, std::size_t block) {
  constexpr std::size_t vectors = pages * (kBlockTokens / V::kWidth);
  constexpr std::size_t line_bytes = 64, dims = type == KvType::f32 ? 1 : 2;
  typename V::Vector sums[queries * vectors], low[vectors], high[vectors];
  unroll<queries * vectors>([&](auto i) { sums[i.at] = V::zero(); });
  const char* const* const page = tile.pages + block;
  const float* x = tile.queries;
  std::size_t offset = 0;
  for (std::size_t i = 0; i < tile.head_dim / dims; ++i, offset += line_bytes) {
    load_lines<V, type, queries, pages>(page, offset, low, high);
    add_products<V, queries, vectors>(low, x, sums);
    if constexpr (dims == 2) add_products<V, queries, vectors>(high, x + queries, sums);
    x += dims * queries;
  }
  if constexpr (dims == 2) {
    if (tile.head_dim % 2 != 0) {
      load_odd_line<V, pages>(page, offset, low);
      add_products<V, queries, vectors>(low, x, sums);
    }
  }
  float* const home = tile.scores + block * kBlockTokens;
  unroll<queries * vectors>([&](auto i) {
    V::store(home + i.at / vectors * kScoreStride + i.at % vectors * V::kWidth, sums[i.at]);
  });
}

template <typename V, KvType type, std::size_t queries, std::size_t pages>
void score_blocks(const SplitTile& tile, std::size_t block) {
  for (; block + pages <= blocks_of(tile); block += pages) {
    score_pages<V, type, queries, pages>(tile, block);
  }
  if constexpr (pages > 1) score_blocks<V, type, queries, pages / 2>(tile, block);
}

// Turns a query's scores into weights. Token t goes to lane t % 16, then lanes are joined in
// halves: one order however many tokens are seen.
template <typename V>
Softmax weigh(float* scores, std::size_t visible) {
  const std::size_t end = (visible + kBlockTokens - 1) / kBlockTokens * kBlockTokens;
  float lanes[kBlockTokens];
  fill<V>(scores + visible, scores + end, -FLT_MAX);
  fill<V>(lanes, lanes + kBlockTokens, -FLT_MAX);
  for (std::size_t t = 0; t < end; t += kBlockTokens) {
    for (std::size_t j = 0; j < kBlockTokens; ++j) {
      lanes[j] = scores[t + j] > lanes[j] ? scores[t + j] : lanes[j];
    }
  }
  for (std::size_t half = kBlockTokens / 2; half > 0; half /= 2) {
    for (std::size_t j = 0; j < half; ++j) {
      lanes[j] = lanes[j + half] > lanes[j] ? lanes[j + half] : lanes[j];
    }
  }
  const float high = lanes[0];
  for (std::size_t t = 0; t < end; ++t) scores[t] = exp_of<V>(scores[t] - high);
  fill<V>(scores + visible, scores + end, 0.0F);
  fill<V>(lanes, lanes + kBlockTokens, 0.0F);
  for (std::size_t t = 0; t < end; t += kBlockTokens) {
    for (std::size_t j = 0; j < kBlockTokens; ++j) lanes[j] += scores[t + j];
  }
  for (std::size_t half = kBlockTokens / 2; half > 0; half /= 2) {
    for (std::size_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return {high, lanes[0]};
}

struct TokenRange {
  std::size_t first;
  std::size_t last;
};

// Where queries' weighted values are summed up: from query `query` and element `at` on.
struct Sums {
  const SplitTile& tile;
  std::size_t query;
  std::size_t at;
};

static inline const float* weights_of(const Sums& sums, std::size_t token) {
  return sums.tile.scores + sums.query * kScoreStride + token;
}

static inline float* home_of(const Sums& sums) {
  return sums.tile.sums + sums.query * sums.tile.head_dim + sums.at;
}

// Adds what the tokens of one page come to.
template <typename V, KvType type, std::size_t queries, std::size_t pairs>
[[gnu::always_inline]] inline void add_page(const Sums& to, TokenRange tokens,
                                            typename V::Vector* sums) {
  constexpr std::size_t pair_bytes = 2 * V::kWidth * bytes_of(type);
  const std::size_t row_bytes = to.tile.head_dim * bytes_of(type);
  const char* const* const page = to.tile.pages + blocks_of(to.tile) + tokens.first / kBlockTokens;
  std::size_t offset = tokens.first % kBlockTokens * row_bytes + to.at * bytes_of(type);
  const float* weights = weights_of(to, tokens.first);
  const float* const end = weights_of(to, tokens.last);
  for (; weights != end; ++weights, offset += row_bytes) {
    unroll<pairs>([&](auto p) {
      constexpr std::size_t at_bytes = p.at * pair_bytes;
      typename V::Vector low, high;
      load_pair<V, type>(page[0] + offset + at_bytes, low, high);
      if constexpr (at_bytes % 64 == 0) fetch<V, queries>(page[kMaxPages] + offset + at_bytes);
      if constexpr (pair_bytes > 64) fetch<V, queries>(page[kMaxPages] + offset + at_bytes + 64);
      unroll<queries>([&](auto q) {
        constexpr std::size_t at = 2 * (q.at * pairs + p.at);
        const typename V::Vector weight = V::broadcast(weights + q.at * kScoreStride);
        sums[at] = V::multiply_add(low, weight, sums[at]);
        sums[at + 1] = V::multiply_add(high, weight, sums[at + 1]);
      });
    });
  }
}

// Adds to 2 * pairs vectors of each query's sums, one chain over the tokens each.
template <typename V, KvType type, std::size_t queries, std::size_t pairs>
void add_pairs(const Sums& to, TokenRange tokens) {
  constexpr std::size_t vectors = 2 * pairs;
  typename V::Vector sums[queries * vectors];
  float* const home = home_of(to);
  const std::size_t stride = to.tile.head_dim;
  unroll<queries * vectors>([&](auto i) {
    sums[i.at] = V::load(home + i.at / vectors * stride + i.at % vectors * V::kWidth);
  });
  while (tokens.first < tokens.last) {
    const std::size_t page_end = (tokens.first / kBlockTokens + 1) * kBlockTokens;
    const std::size_t last = page_end < tokens.last ? page_end : tokens.last;
    add_page<V, type, queries, pairs>(to, {tokens.first, last}, sums);
    tokens.first = last;
  }
  unroll<queries * vectors>([&](auto i) {
    V::store(home + i.at / vectors * stride + i.at % vectors * V::kWidth, sums[i.at]);
  });
}

// The same for the last elements, fewer than a pair of vectors.
template <typename V, KvType type>
void add_rest(const Sums& to, TokenRange tokens, std::size_t queries) {
  const std::size_t head_dim = to.tile.head_dim, width = head_dim - to.at;
  for (std::size_t t = tokens.first; t < tokens.last; ++t) {
    const char* const page = to.tile.pages[blocks_of(to.tile) + t / kBlockTokens];
    float values[2 * V::kWidth];
    for (std::size_t i = 0; i < width; ++i) {
      values[i] = element<V, type>(page, t % kBlockTokens * head_dim + to.at + i);
    }
    for (std::size_t q = 0; q < queries; ++q) {
      const float weight = weights_of(to, t)[q * kScoreStride];
      float* const sums = home_of(to) + q * head_dim;
      for (std::size_t i = 0; i < width; ++i) {
        sums[i] = V::multiply_add_one(values[i], weight, sums[i]);
      }
    }
  }
}

// Adds the tokens' weighted values, for the queries from to.query on and all elements from to.at
// on.
template <typename V, KvType type, std::size_t queries, std::size_t pairs>
void add_elements(Sums to, TokenRange tokens) {
  constexpr std::size_t width = 2 * pairs * V::kWidth;
  for (; to.at + width <= to.tile.head_dim; to.at += width) {
    add_pairs<V, type, queries, pairs>(to, tokens);
  }
  if constexpr (pairs > 1) {
    add_elements<V, type, queries, pairs / 2>(to, tokens);
  } else if (to.at < to.tile.head_dim) {
    add_rest<V, type>(to, tokens, queries);
  }
}

template <typename V, KvType type, std::size_t queries>
void add_values(const Sums& to, TokenRange tokens) {
  constexpr std::size_t pairs = together(V::kSums, 2 * queries);
  // Where elements take several passes, a few pages at a time do, which stay in the first cache.
  const bool is_single = to.tile.head_dim <= 2 * pairs * V::kWidth;
  const std::size_t pages = 1 + kStayingBytes / (kBlockTokens * to.tile.head_dim * bytes_of(type));
  const std::size_t step = is_single ? kSplitTokens : pages * kBlockTokens;
  for (; tokens.first < tokens.last; tokens.first += step) {
    const std::size_t end = tokens.first + step;
    const TokenRange part{tokens.first, end < tokens.last ? end : tokens.last};
    add_elements<V, type, queries, pairs>(to, part);
  }
}

// What all queries see they read together, then each the few tokens that those before it do not
// see: of what a query must not see nothing comes to its sums, not even a NaN.
template <typename V, KvType type, std::size_t queries>
void run_split(SplitTile& tile) {
  constexpr std::size_t pages = together(V::kSums, queries * (kBlockTokens / V::kWidth));
  score_blocks<V, type, queries, pages>(tile, 0);
  for (std::size_t q = 0; q < queries; ++q) {
    tile.softmax[q] = weigh<V>(tile.scores + q * kScoreStride, tile.visible[q]);
  }
  fill<V>(tile.sums, tile.sums + queries * tile.head_dim, 0.0F);
  const std::size_t common = tile.visible[0];
  add_values<V, type, queries>({tile, 0, 0}, {0, common});
  for (std::size_t q = 0; q < queries; ++q) {
    if (tile.visible[q] > common) add_values<V, type, 1>({tile, q, 0}, {common, tile.visible[q]});
  }
  if constexpr (type == KvType::bf16) {
    for (std::size_t q = 0; q < queries; ++q) {
      float* const row = tile.sums + q * tile.head_dim;
      for (std::size_t at = 0; at + 2 * V::kWidth <= tile.head_dim; at += 2 * V::kWidth) {
        typename V::Vector low = V::load(row + at), high = V::load(row + at + V::kWidth);
        V::interleave(low, high);
        V::store(row + at, low);
        V::store(row + at + V::kWidth, high);
      }
    }
  }
}

// Finds the function of exactly tile.count queries.
template <typename V, KvType type, std::size_t queries = V::kMaxQueries>
void attend_split(SplitTile& tile) {
  if (tile.count == queries) {
    run_split<V, type, queries>(tile);
  } else if constexpr (queries > 1) {
    attend_split<V, type, queries - 1>(tile);
  }
}

template <typename V>
AttentionKernel attention_of(KvType type) {
  return {V::kMaxQueries,
          type == KvType::f32 ? attend_split<V, KvType::f32> : attend_split<V, KvType::bf16>};
}

}  // namespace aegaeon::ops

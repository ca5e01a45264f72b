#include "ops/cpu/attention_split.h"
#include "ops/cpu/vectors_baseline.h"

namespace aegaeon::ops {
namespace {

struct Plain : PlainVectors {
  static constexpr std::size_t kMaxQueries = 3;
  static constexpr std::size_t kFetchingQueries = 3;
};

}  // namespace

AttentionKernel baseline_attention(KvType type) { return attention_of<Plain>(type); }

}  // namespace aegaeon::ops

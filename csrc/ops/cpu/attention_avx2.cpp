// Compiled for AVX2 and FMA (CMakeLists.txt); nothing here may be called without.
#if defined(__x86_64__)

#include "ops/cpu/attention_split.h"
#include "ops/cpu/vectors_avx2.h"

namespace aegaeon::ops {
namespace {

struct Avx2 : Avx2Vectors {
  static constexpr std::size_t kMaxQueries = 6;
  static constexpr std::size_t kFetchingQueries = 4;
};

}  // namespace

AttentionKernel avx2_attention(KvType type) { return attention_of<Avx2>(type); }

}  // namespace aegaeon::ops

#endif

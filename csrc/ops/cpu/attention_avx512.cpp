// Compiled for AVX-512F (CMakeLists.txt); nothing here may be called without.
#if defined(__x86_64__)

#include "ops/cpu/attention_split.h"
#include "ops/cpu/vectors_avx512.h"

namespace aegaeon::ops {
namespace {

struct Avx512 : Avx512Vectors {
  static constexpr std::size_t kMaxQueries = kMaxTileQueries;
  static constexpr std::size_t kFetchingQueries = 8;
};

}  // namespace

AttentionKernel avx512_attention(KvType type) { return attention_of<Avx512>(type); }

}  // namespace aegaeon::ops

#endif

// Compiled for AVX-512BW and VNNI (CMakeLists.txt); nothing here may be called without.
#if defined(__x86_64__)

#include "ops/cpu/groups_avx512.h"

namespace aegaeon::ops {
namespace {

struct Avx512VnniGroups : Avx512Groups {
  static Sums multiply_add(Integers weights, Integers pair, Sums sum) {
    const Integers wide = _mm512_dpwssd_epi32(reinterpret_cast<Integers>(sum), weights, pair);
    return reinterpret_cast<Sums>(wide);
  }
};

}  // namespace

PanelKernel avx512_vnni_group_kernel() { return group_kernel_of<Avx512VnniGroups>(); }

}  // namespace aegaeon::ops

#endif

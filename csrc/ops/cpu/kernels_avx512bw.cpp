// Compiled for AVX-512BW (CMakeLists.txt); nothing here may be called without.
#if defined(__x86_64__)

#include "ops/cpu/groups_avx512.h"

namespace aegaeon::ops {
namespace {

struct Avx512BwGroups : Avx512Groups {
  static Sums multiply_add(Integers weights, Integers pair, Sums sum) {
    return sum + reinterpret_cast<Sums>(_mm512_madd_epi16(weights, pair));
  }
};

}  // namespace

PanelKernel avx512bw_group_kernel() { return group_kernel_of<Avx512BwGroups>(); }

}  // namespace aegaeon::ops

#endif

#include "ops/cpu/isa.h"

#include <atomic>
#include <stdexcept>

namespace aegaeon::ops {
namespace {

// The compiler's test asks the system too whether it saves the wide registers.
bool is_supported(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && is_supported(Isa::avx2);
  }
  return false;
#else
  return isa == Isa::baseline;
#endif
}

Isa best_isa() {
  for (const Isa isa : {Isa::avx512, Isa::avx2}) {
    if (is_supported(isa)) return isa;
  }
  return Isa::baseline;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

void force_isa(const std::string& name) {
  if (name == "best") {
    chosen().store(best_isa());
    return;
  }
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (name != isa_name(isa)) continue;
    if (!is_supported(isa)) {
      throw std::invalid_argument("this processor has no " + name + "; use best");
    }
    chosen().store(isa);
    return;
  }
  throw std::invalid_argument("no instruction set " + name +
                              "; use best, baseline, avx2 or avx512");
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace aegaeon::ops

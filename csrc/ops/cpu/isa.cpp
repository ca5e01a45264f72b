#include "ops/cpu/isa.h"

#include <atomic>
#include <stdexcept>

namespace aegaeon::ops {
namespace {

struct Level {
  const char* name;
  Isa floats;
  IntegerIsa integers;
  bool has_bf16_products;
};

constexpr Level kLevels[] = {
    {"baseline", Isa::baseline, IntegerIsa::baseline, false},
    {"avx2", Isa::avx2, IntegerIsa::avx2, false},
    {"avx512", Isa::avx512, IntegerIsa::avx512bw, false},
    {"avx512_vnni", Isa::avx512, IntegerIsa::avx512_vnni, false},
    {"avx512_bf16", Isa::avx512, IntegerIsa::avx512_vnni, true},
};

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

bool is_supported(IntegerIsa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case IntegerIsa::baseline:
      return true;
    case IntegerIsa::avx2:
      return is_supported(Isa::avx2);
    case IntegerIsa::avx512bw:
      return __builtin_cpu_supports("avx512bw") && is_supported(Isa::avx512);
    case IntegerIsa::avx512_vnni:
      return __builtin_cpu_supports("avx512vnni") && is_supported(IntegerIsa::avx512bw);
  }
  return false;
#else
  return isa == IntegerIsa::baseline;
#endif
}

bool can_multiply_bf16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") && is_supported(IntegerIsa::avx512bw);
#else
  return false;
#endif
}

// AVX-512BW alone is no level: without it, avx512 computes with integers as AVX2 does.
bool is_supported(const Level& level) {
  return is_supported(level.floats) && (!level.has_bf16_products || can_multiply_bf16()) &&
         (level.integers == IntegerIsa::avx512bw || is_supported(level.integers));
}

const Level& best_level() {
  const Level* best = &kLevels[0];
  for (const Level& level : kLevels) {
    if (is_supported(level)) best = &level;
  }
  return *best;
}

std::atomic<const Level*>& chosen() {
  static std::atomic<const Level*> level{&best_level()};
  return level;
}

const Level& current() { return *chosen().load(std::memory_order_relaxed); }

}  // namespace

Isa current_isa() { return current().floats; }

IntegerIsa current_integer_isa() {
  static const bool has_avx512bw = is_supported(IntegerIsa::avx512bw);
  const IntegerIsa isa = current().integers;
  return isa == IntegerIsa::avx512bw && !has_avx512bw ? IntegerIsa::avx2 : isa;
}

bool has_bf16_products() { return current().has_bf16_products; }

void force_isa(const std::string& name) {
  if (name == "best") {
    chosen().store(&best_level());
    return;
  }
  for (const Level& level : kLevels) {
    if (name != level.name) continue;
    if (!is_supported(level)) {
      throw std::invalid_argument("this processor has no " + name + "; use best");
    }
    chosen().store(&level);
    return;
  }
  throw std::invalid_argument("no instruction set " + name +
                              "; use best, baseline, avx2, avx512, avx512_vnni or avx512_bf16");
}

const char* isa_name() { return current().name; }

}  // namespace aegaeon::ops

// Instruction set levels: every kernel is compiled once per level and chosen when it runs.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>

#define EAP_INLINE inline __attribute__((always_inline))
#define EAP_INLINE_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)
#define EAP_X86_LEVELS 1
#define EAP_TARGET_V3 __attribute__((target("avx,avx2,fma,f16c,bmi,bmi2")))
#define EAP_TARGET_V4 \
  __attribute__((target("avx,avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")))
#endif

namespace eap {

enum class Isa { base, v3, v4, v4_bf16 };

inline const char* isa_name(Isa isa) {
  return isa == Isa::v4_bf16 ? "x86-64-v4-bf16" : isa == Isa::v4 ? "x86-64-v4" : isa == Isa::v3 ? "x86-64-v3" : "default";
}

// EAP_CPU_ISA names another level that the processor has, so that one machine can test them all.
inline Isa isa() {
  static const Isa chosen = [] {
    Isa best = Isa::base, has = best;
#ifdef EAP_X86_LEVELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
      best = Isa::v3;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vl"))
        best = __builtin_cpu_supports("avx512bf16") ? Isa::v4_bf16 : Isa::v4;
    }
    has = best;
    // Intel's bf16 dot product runs at half the rate of two fp32 products (measured on Sapphire Rapids).
    if (__builtin_cpu_is("intel")) best = std::min(best, Isa::v4);
#endif
    const char* asked = std::getenv("EAP_CPU_ISA");
    for (Isa level : {Isa::base, Isa::v3, Isa::v4, Isa::v4_bf16})
      if (asked && level <= has && !std::strcmp(asked, isa_name(level))) return level;
    return best;
  }();
  return chosen;
}

}  // namespace eap

// Instruction set levels: every kernel is compiled once per level and chosen when it runs.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>

#define EAP_INLINE inline __attribute__((always_inline))
#define EAP_INLINE_LAMBDA __attribute__((always_inline))

// Not clang, which accepts in inline assembly only the instruction set of the whole file.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EAP_X86_LEVELS 1
#define EAP_TARGET_V3 __attribute__((target("avx,avx2,fma,f16c,bmi,bmi2")))
#define EAP_V4_FEATURES "avx,avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl"
#define EAP_TARGET_V4 __attribute__((target(EAP_V4_FEATURES)))
#if defined(__linux__) && __GNUC__ >= 11
#define EAP_AMX 1
#define EAP_TARGET_AMX __attribute__((target(EAP_V4_FEATURES ",amx-tile,amx-bf16")))
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace eap {

enum class Isa { base, v3, v4, v4_bf16, v4_amx };

// What was built.
inline constexpr Isa kLevels[] = {
    Isa::base,
#ifdef EAP_X86_LEVELS
    Isa::v3,       // vectors of 32 bytes
    Isa::v4,       // of 64 bytes
    Isa::v4_bf16,  // with products of bf16 pairs
#endif
#ifdef EAP_AMX
    Isa::v4_amx,
#endif
};

inline const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"default", "x86-64-v3", "x86-64-v4", "x86-64-v4-bf16", "x86-64-v4-amx"};
  return names[int(isa)];
}

// Whether the processor has AMX for bf16 and Linux, which is asked here, lets this process use it.
inline bool amx_allowed() {
#ifdef EAP_AMX
  constexpr unsigned amx_and_bf16 = 1u << 24 | 1u << 22;
  constexpr long request_permission = 0x1023, amx_state = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & amx_and_bf16) != amx_and_bf16) return false;
  return syscall(SYS_arch_prctl, request_permission, amx_state) == 0;
#else
  return false;
#endif
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
    if (has == Isa::v4_bf16 && amx_allowed()) best = has = Isa::v4_amx;
#endif
    const char* asked = std::getenv("EAP_CPU_ISA");
    for (Isa level : kLevels)
      if (asked && level <= has && !std::strcmp(asked, isa_name(level))) return level;
    return best;
  }();
  return chosen;
}

}  // namespace eap

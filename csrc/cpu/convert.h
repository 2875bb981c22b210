// Conversions between storage and accumulation types, written so that the compiler vectorises their loops.
#pragma once
#include <bit>
#include <cstdint>

#include "isa.h"

namespace eap {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };
template <class T> using acc_t = typename Accumulate<T>::type;

EAP_INLINE double load(double x) { return x; }
EAP_INLINE float load(float x) { return x; }
EAP_INLINE float load(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
EAP_INLINE float load(f16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  // The product re-biases the exponent and normalises subnormals; infinities and NaN need their exponent filled.
  uint32_t bits = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(bits | uint32_t(x.bits & 0x8000) << 16);
}

// `count` numbers, `step` apart, side by side as A. Neighbours have a loop of their own, which compilers vectorise.
template <class A, class T> EAP_INLINE void widen(const T* from, int64_t step, int64_t count, A* to) {
  if (step == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = A(load(from[i]));
  else
    for (int64_t i = 0; i < count; ++i) to[i] = A(load(from[i * step]));
}

EAP_INLINE void store(double& to, double x) { to = x; }
EAP_INLINE void store(float& to, float x) { to = x; }
EAP_INLINE void store(bf16& to, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  to.bits = uint16_t((x != x ? bits | 0x400000u : rounded) >> 16);
}
EAP_INLINE void store(f16& to, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), a = bits & 0x7fffffffu;
  const uint32_t normal = (a + 0xfff + ((a >> 13) & 1) - 0x38000000u) >> 13;
  // One unit of 0.5f's last place is the smallest fp16 subnormal: the addition rounds to it.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(a) + 0.5f) - 0x3f000000u;
  uint32_t half = a < 0x38800000u ? subnormal : normal;
  half = a >= 0x477ff000u ? 0x7c00u : half;
  half = a > 0x7f800000u ? 0x7e00u : half;
  to.bits = uint16_t(half | (bits >> 16 & 0x8000u));
}

}  // namespace eap

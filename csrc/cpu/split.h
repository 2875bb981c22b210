// fp32 on AMX, which multiplies bf16: each fp32 value is split into three bf16 parts, and six of the nine part products
// reproduce the product of two values to 2^-23, fp32's own precision. Rows of very small or large values are first
// divided by a power of two, so that no part and no product falls below the smallest normal value.
#pragma once
#include <algorithm>
#include <bit>
#include <cstring>

#include "product.h"

namespace eap {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

constexpr int64_t kGroup = Group<amx_split>::values, kHalf = kGroup / 2;

// Whether values up to this size, given as a float's bits, can be split unscaled: products of two such values have 24
// normal bits.
EAP_INLINE bool splittable(uint32_t largest) {
  return largest == 0 || (largest >= std::bit_cast<uint32_t>(0x1p-50f) && largest < std::bit_cast<uint32_t>(0x1p50f));
}

// The power of two at or below the largest value, clamped so that products stay normal.
EAP_INLINE float scale_of(uint32_t largest) {
  return std::bit_cast<float>(std::clamp(largest >> 23, 127u - 60, 127u + 60) << 23);
}

// Splits x and y into pairs of parts: the largest parts at `to`, the next ones `step` further on. Infinity becomes NaN.
EAP_INLINE void split(const Floats& of_x, const Floats& of_y, amx_split* to, int64_t step) {
  Floats x = of_x, y = of_y;
  for (int part = 0; part < 3; ++part) {
    // The last part has at most eight bits: it needs no rounding, which could turn a NaN into another value.
    const uint32_t half = part < 2 ? 0x8000 : 0;
    const Words first = ((Words)x + half) & 0xffff0000, second = ((Words)y + half) & 0xffff0000;
    const Words pairs = first >> 16 | second;
    std::memcpy(to + part * step, &pairs, sizeof(pairs));
    x -= (Floats)first;
    y -= (Floats)second;
  }
}

// The larger of `largest` and the bits of |x|.
EAP_INLINE void include(const Floats& x, Words& largest) {
  const Words size = (Words)x & 0x7fffffff;
  largest = size > largest ? size : largest;
}

// Splits a row of `count` values, a multiple of kGroup; values k and k + 16 of a group are a pair. Returns what the row
// was divided by. Meanwhile fetches as many values from `next`.
EAP_INLINE float split_row(const float* from, int64_t count, amx_split* to, const float* next) {
  Words largest = {};
  const auto run = [&](float scale) EAP_INLINE_LAMBDA {
    for (int64_t k = 0; k < count; k += kGroup) {
      __builtin_prefetch(next + k, 0, 2);
      __builtin_prefetch(next + k + kHalf, 0, 2);
      Floats x, y;
      std::memcpy(&x, from + k, sizeof(x));
      std::memcpy(&y, from + k + kHalf, sizeof(y));
      include(x, largest);
      include(y, largest);
      split(x * scale, y * scale, to + k / kGroup * Group<amx_split>::elements, kHalf);
    }
  };
  run(1);
  uint32_t most = 0;
  for (int i = 0; i < kHalf; ++i) most = std::max(most, largest[i]);
  if (splittable(most)) return 1;
  const float scale = scale_of(most);
  run(1 / scale);
  return scale;
}

// Splits 16 rows and stores them as columns: element i of row r at to[i * ld + r]. `scales` is what each row was
// divided by; returns whether any of them is not 1.
EAP_INLINE bool split_columns(const float* const* rows, int64_t count, amx_split* to, int64_t ld, float* scales) {
  Words largest = {};
  const auto run = [&](const Floats& scale) EAP_INLINE_LAMBDA {
    for (int64_t k = 0; k < count; k += kGroup) {
      const float* from[kHalf];
      for (int r = 0; r < kHalf; ++r) from[r] = rows[r] + k;
      alignas(64) float columns[kGroup * kHalf];
      transpose<float, 64>(from, kGroup, columns, kHalf);
      amx_split* const group = to + k / kGroup * Group<amx_split>::elements * ld;
      for (int64_t i = 0; i < kHalf; ++i) {
        Floats x, y;
        std::memcpy(&x, columns + i * kHalf, sizeof(x));
        std::memcpy(&y, columns + (i + kHalf) * kHalf, sizeof(y));
        include(x, largest);
        include(y, largest);
        split(x * scale, y * scale, group + i * ld, kHalf * ld);
      }
    }
  };
  run(1 + Floats{});
  Floats inverse;
  bool scaled = false;
  for (int r = 0; r < kHalf; ++r) {
    scaled |= !splittable(largest[r]);
    scales[r] = splittable(largest[r]) ? 1 : scale_of(largest[r]);
    inverse[r] = 1 / scales[r];
  }
  if (scaled) run(inverse);
  return scaled;
}

}  // namespace eap

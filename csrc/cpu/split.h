// fp32 on AMX tiles, which multiply bf16: a value is the sum of three, each what is left rounded to eight bits, and six
// of the nine products of two values' parts make their product but for 2^-23 of it, fp32's own precision. Rows of very
// small or large values are divided by a power of two first, so that no part of them or of a product is lost below the
// smallest normal value.
#pragma once
#include <algorithm>
#include <bit>
#include <cstring>

#include "product.h"

namespace eap {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

constexpr int64_t kGroup = Group<amx_split>::values, kHalf = kGroup / 2;

// Whether values of this size, the bits of a float, can be split as they are: their products with any other such values
// have 24 bits that are normal.
EAP_INLINE bool splittable(uint32_t largest) {
  return largest == 0 || (largest >= std::bit_cast<uint32_t>(0x1p-50f) && largest < std::bit_cast<uint32_t>(0x1p50f));
}

// The power of two next to the largest of some values, or the nearest of those whose products are normal.
EAP_INLINE float scale_of(uint32_t largest) {
  return std::bit_cast<float>(std::clamp(largest >> 23, 127u - 60, 127u + 60) << 23);
}

// Pairs of x's and y's parts: the largest at `to`, then a step apart. An infinite value leaves NaN.
EAP_INLINE void split(const Floats& of_x, const Floats& of_y, amx_split* to, int64_t step) {
  Floats x = of_x, y = of_y;
  for (int part = 0; part < 3; ++part) {
    // The last has no more than eight bits, and keeps a NaN that rounding would carry out of the exponent.
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

// Splits a row of `count` values, a multiple of a group's, where values k and k + 16 of a group are a pair. Returns
// what they were divided by. As much is fetched from `next` meanwhile.
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

// 16 such rows as columns, element i of row r at to[i * ld + r], and what they were divided by: whether any by another
// number than one.
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

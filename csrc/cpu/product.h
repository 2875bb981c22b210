// Register-tiled matrix products: rows of `a` are broadcast, columns of `b` lie in vectors.
// c[m, n] += sum_k a[m, k] * b[k, n] over one tile of M rows and two vectors of columns.
#pragma once
#include <algorithm>
#include <cstring>

#include "convert.h"

namespace eap {

template <class A, int BYTES> struct Vector { typedef A type __attribute__((vector_size(BYTES))); };
template <class A, int BYTES> using vector_t = typename Vector<A, BYTES>::type;

// Two neighbouring bf16 values of a row, multiplied and summed by one instruction (AVX512-BF16).
struct bf16x2 { uint32_t bits; };
template <> struct Accumulate<bf16x2> { using type = float; };

// Rows of a register tile: accumulators, two vectors of b and a broadcast fit into 32 (AVX-512) or 16 registers.
constexpr int tile_rows(int bytes) { return bytes == 64 ? 12 : 6; }
template <class E, int BYTES> constexpr int64_t tile_columns = 2 * BYTES / int64_t(sizeof(E));

template <class V, class E> EAP_INLINE void multiply_add(V& acc, E a, const V& b) { acc += a * b; }
template <class V> EAP_INLINE void multiply_add(V& acc, bf16x2 a, const V& b) {
#ifdef EAP_X86_LEVELS
  typedef uint32_t Words __attribute__((vector_size(sizeof(V))));
  const Words pairs = a.bits + Words{};
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(pairs), "v"(b));
#endif
}

template <class E, int BYTES, int M>
EAP_INLINE void multiply(const E* a, int64_t lda, const E* b, int64_t ldb, int64_t inner,
                         vector_t<acc_t<E>, BYTES> (&c)[M][2]) {
  using V = vector_t<acc_t<E>, BYTES>;
  for (int64_t k = 0; k < inner; ++k) {
    V left, right;
    std::memcpy(&left, b + k * ldb, BYTES);
    std::memcpy(&right, b + k * ldb + BYTES / sizeof(E), BYTES);
    for (int m = 0; m < M; ++m) {
      multiply_add(c[m][0], a[m * lda + k], left);
      multiply_add(c[m][1], a[m * lda + k], right);
    }
  }
}

// Calls `tile(std::integral_constant<int, M>, row)` over `rows` rows, in tiles as high as registers allow.
template <int BYTES, class Tile> EAP_INLINE void for_tiles(int64_t rows, const Tile& tile) {
  constexpr int M = tile_rows(BYTES);
  int64_t row = 0;
  for (; row + M <= rows; row += M) tile(std::integral_constant<int, M>{}, row);
  if constexpr (M > 8)
    for (; row + 8 <= rows; row += 8) tile(std::integral_constant<int, 8>{}, row);
  for (; row + 4 <= rows; row += 4) tile(std::integral_constant<int, 4>{}, row);
  for (; row + 2 <= rows; row += 2) tile(std::integral_constant<int, 2>{}, row);
  for (; row < rows; ++row) tile(std::integral_constant<int, 1>{}, row);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define EAP_SHUFFLES 1
#endif
#endif

#ifdef EAP_SHUFFLES
// Elements of a and b in turns: the first halves go to `low`, the second to `high`.
template <class V, int64_t... I>
EAP_INLINE void interleave(const V& a, const V& b, V& low, V& high, std::integer_sequence<int64_t, I...>) {
  constexpr int64_t n = sizeof...(I);
  low = __builtin_shufflevector(a, b, (I % 2 * n + I / 2)...);
  high = __builtin_shufflevector(a, b, (I % 2 * n + n / 2 + I / 2)...);
}
#endif

// to[k, r] = from[r, k] for `rows` = tile_columns rows; `inner` is a multiple of the lanes.
template <class E, int BYTES> EAP_INLINE void transpose(const E* from, int64_t ld, int64_t inner, E* to) {
  constexpr int64_t lanes = BYTES / int64_t(sizeof(E)), columns = 2 * lanes;
#ifdef EAP_SHUFFLES
  using V = vector_t<acc_t<E>, BYTES>;
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t k = 0; k < inner; k += lanes) {
      V x[lanes], y[lanes];
      for (int64_t r = 0; r < lanes; ++r) std::memcpy(&x[r], from + (half * lanes + r) * ld + k, BYTES);
      // Each pass interleaves row i with row i + lanes / 2; log2(lanes) passes transpose.
      for (int64_t step = 1; step < lanes; step *= 2) {
        for (int64_t r = 0; r < lanes / 2; ++r)
          interleave(x[r], x[r + lanes / 2], y[2 * r], y[2 * r + 1], std::make_integer_sequence<int64_t, lanes>{});
        for (int64_t r = 0; r < lanes; ++r) x[r] = y[r];
      }
      for (int64_t r = 0; r < lanes; ++r) std::memcpy(to + (k + r) * columns + half * lanes, &x[r], BYTES);
    }
#else
  for (int64_t r = 0; r < columns; ++r)
    for (int64_t k = 0; k < inner; ++k) to[k * columns + r] = from[r * ld + k];
#endif
}

}  // namespace eap

// Every microkernel, compiled once per instruction set: edge_scores and expand choose among them by height and width.
#include "product.h"

#include <array>

namespace eap {
namespace {

template <class V, class E> EAP_INLINE void multiply_add(V& acc, E a, const V& b) { acc += a * b; }
template <class V> EAP_INLINE void multiply_add(V& acc, bf16x2 a, const V& b) {
#ifdef EAP_X86_LEVELS
  typedef uint32_t Words __attribute__((vector_size(sizeof(V))));
  const Words pairs = a.bits + Words{};
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(pairs), "v"(b));
#endif
}

template <class E, int BYTES, int M, int W>
EAP_INLINE void multiply(const E* a, int64_t lda, const E* b, int64_t ldb, int64_t inner, acc_t<E>* c, int64_t ldc,
                         bool add, const Ahead& ahead) {
  using V = vector_t<acc_t<E>, BYTES>;
  constexpr int64_t lanes = BYTES / int64_t(sizeof(E)), run = 16;
  V sums[M][W] = {};
  const auto step = [&](int64_t k) EAP_INLINE_LAMBDA {
    V columns[W];
    for (int w = 0; w < W; ++w) std::memcpy(&columns[w], b + k * ldb + w * lanes, BYTES);
    for (int m = 0; m < M; ++m)
      for (int w = 0; w < W; ++w) multiply_add(sums[m][w], a[m * lda + k], columns[w]);
  };
  // Load and multiply: a row of columns and one value of every row at a time.
  int64_t k = 0;
  for (; k + run <= inner; k += run) {
    for (int64_t i = 0; i < ahead.count; ++i) __builtin_prefetch(ahead.rows[i] + k * ahead.element, 0, 2);
#pragma GCC unroll 4
    for (int64_t j = 0; j < run; ++j) step(k + j);
  }
  for (; k < inner; ++k) step(k);
  // Store.
  for (int m = 0; m < M; ++m)
    for (int w = 0; w < W; ++w) {
      V before = {};
      if (add) std::memcpy(&before, c + m * ldc + w * lanes, BYTES);
      sums[m][w] += before;
      std::memcpy(c + m * ldc + w * lanes, &sums[m][w], BYTES);
    }
}

#define EAP_MICROKERNEL(NAME, BYTES, TARGET)                                                                  \
  template <class E, int M, int W>                                                                            \
  TARGET void NAME(const E* a, int64_t lda, const E* b, int64_t ldb, int64_t inner, acc_t<E>* c, int64_t ldc, \
                   bool add, const Ahead& ahead) {                                                            \
    multiply<E, BYTES, M, W>(a, lda, b, ldb, inner, c, ldc, add, ahead);                                      \
  }
EAP_MICROKERNEL(base, 16, )
#ifdef EAP_X86_LEVELS
EAP_MICROKERNEL(v3, 32, EAP_TARGET_V3)
EAP_MICROKERNEL(v4, 64, EAP_TARGET_V4)
#endif

template <class E, int BYTES, int W, int... M>
constexpr std::array<Microkernel<E>, sizeof...(M)> table(std::integer_sequence<int, M...>) {
#ifdef EAP_X86_LEVELS
  if constexpr (BYTES == 64) return {v4<E, M + 1, W>...};
  if constexpr (BYTES == 32) return {v3<E, M + 1, W>...};
#endif
  return {base<E, M + 1, W>...};
}

}  // namespace

template <class E, int BYTES> Microkernel<E> microkernel(int64_t rows, int64_t vectors) {
  constexpr auto heights = std::make_integer_sequence<int, strip_rows(BYTES)>{};
  static constexpr std::array narrow = table<E, BYTES, 1>(heights), wide = table<E, BYTES, kVectors>(heights);
  return (vectors == 1 ? narrow : wide)[rows - 1];
}

template Microkernel<float> microkernel<float, 16>(int64_t, int64_t);
template Microkernel<double> microkernel<double, 16>(int64_t, int64_t);
#ifdef EAP_X86_LEVELS
template Microkernel<float> microkernel<float, 32>(int64_t, int64_t);
template Microkernel<double> microkernel<double, 32>(int64_t, int64_t);
template Microkernel<float> microkernel<float, 64>(int64_t, int64_t);
template Microkernel<double> microkernel<double, 64>(int64_t, int64_t);
template Microkernel<bf16x2> microkernel<bf16x2, 64>(int64_t, int64_t);
#endif

}  // namespace eap

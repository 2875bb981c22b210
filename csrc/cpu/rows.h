// Rows of operands in any dtype, and their sums in a fixed order that vectors can add up.
#pragma once
#include <type_traits>

#include "dispatch.h"

namespace eap {

// Elements of a row that are held widened at once: a few rows of them stay in the cache.
constexpr int64_t kRow = 1024;

template <class A, class T> EAP_INLINE const A* widened(const T* x, int64_t step, int64_t count, A* buffer) {
  if constexpr (std::is_same_v<A, T>)
    if (step == 1) return x;
  widen(x, step, count, buffer);
  return buffer;
}

// `count` elements from `offset` on, where they are if they are contiguous and of type A, else in the buffer.
template <class A> EAP_INLINE const A* row(const Strided& x, int64_t offset, int64_t count, A* buffer) {
  const int64_t step = x.stride[3];
  switch (x.dtype) {
    case Dtype::f64: return widened<A>(static_cast<const double*>(x.data) + offset, step, count, buffer);
    case Dtype::f32: return widened<A>(static_cast<const float*>(x.data) + offset, step, count, buffer);
    case Dtype::bf16: return widened<A>(static_cast<const bf16*>(x.data) + offset, step, count, buffer);
    default: return widened<A>(static_cast<const f16*>(x.data) + offset, step, count, buffer);
  }
}

template <class A, class T> EAP_INLINE void put(const A* from, T* to, int64_t step, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(to[i * step], from[i]);
}

template <class A> EAP_INLINE void put(const A* from, Dtype dtype, void* to, int64_t offset, int64_t step, int64_t n) {
  switch (dtype) {
    case Dtype::f64: return put(from, static_cast<double*>(to) + offset, step, n);
    case Dtype::f32: return put(from, static_cast<float*>(to) + offset, step, n);
    case Dtype::bf16: return put(from, static_cast<bf16*>(to) + offset, step, n);
    default: return put(from, static_cast<f16*>(to) + offset, step, n);
  }
}

// The sum of `term(i)` for i < count.
template <int BYTES, class A, class Term> EAP_INLINE A sum_of(int64_t count, const Term& term) {
  constexpr int64_t lanes = 4 * BYTES / int64_t(sizeof(A));
  A sums[lanes] = {}, rest = 0;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    for (int64_t j = 0; j < lanes; ++j) sums[j] += term(i + j);
  for (; i < count; ++i) rest += term(i);
  for (int64_t half = lanes / 2; half; half /= 2)
    for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  return sums[0] + rest;
}

template <int BYTES, class A> EAP_INLINE A sum(const A* x, int64_t count) {
  return sum_of<BYTES, A>(count, [=](int64_t i) EAP_INLINE_LAMBDA { return x[i]; });
}

template <int BYTES, class A> EAP_INLINE A dot(const A* a, const A* b, int64_t count) {
  return sum_of<BYTES, A>(count, [=](int64_t i) EAP_INLINE_LAMBDA { return a[i] * b[i]; });
}

}  // namespace eap

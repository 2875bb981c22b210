// Rows of a norm's input, normalised: a row is read once from memory, and then from the cache.
#include <algorithm>
#include <cmath>

#include "rows.h"

namespace eap {
namespace {

template <class T, int BYTES> struct Body {
  using A = acc_t<T>;

  EAP_INLINE static void run(const NormaliseRows& p, int64_t task) {
    const int64_t begin = task * p.rows_per_task, end = std::min(begin + p.rows_per_task, p.x.size[0] * p.count);
    A* const values = scratch<A>(p.x.size[2]);
    for (int64_t i = begin; i < end; ++i) one(p, i / p.count, i % p.count, values);
  }

  EAP_INLINE static void one(const NormaliseRows& p, int64_t m, int64_t n, A* values) {
    const int64_t D = p.x.size[2], token = p.rows ? p.rows[n] : n;
    // Load: widened, in the thread's own buffer even where it need not be, as the mean may be taken off.
    const T* const x = static_cast<const T*>(p.x.data) + m * p.x.stride[0] + token * p.x.stride[1];
    const A* const read = widened<A>(x, p.x.stride[2], D, values);
    if (read != values) std::copy_n(read, D, values);
    // Reduce.
    if (p.centred) {
      const A mean = sum<BYTES>(values, D) / A(D);
      for (int64_t i = 0; i < D; ++i) values[i] -= mean;
    }
    const A r = A(1) / std::sqrt(dot<BYTES>(values, values, D) / A(D) + A(p.eps));
    static_cast<A*>(p.r)[m * p.count + n] = r;
    // Store.
    if (p.out == nullptr) return;
    for (int64_t i = 0; i < D; ++i) values[i] *= r;
    put(values, p.out_dtype, p.out, m * p.out_stride[0] + n * p.out_stride[1], p.out_stride[2], D);
  }
};

}  // namespace

int64_t NormaliseRows::tasks() const { return divide_up(x.size[0] * count, rows_per_task); }

void NormaliseRows::run(int64_t task) const { dispatch<Body>(dtype, *this, task); }

}  // namespace eap

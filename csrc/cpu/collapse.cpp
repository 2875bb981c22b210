// Gradients at a norm's readers, summed over path points, and their products with what the readers give: one pass over
// both, in their own dtypes.
#include <algorithm>

#include "rows.h"

namespace eap {
namespace {

template <class A, int BYTES> struct Body {
  EAP_INLINE static void run(const Collapse& p, int64_t task) {
    // Sums are in one of the two wide types.
    if constexpr (std::is_same_v<A, acc_t<A>>) {
      const int64_t begin = task * p.tokens_per_task, end = std::min(begin + p.tokens_per_task, p.count);
      for (int64_t n = begin; n < end; ++n)
        for (int64_t h = 0; h < p.heads; ++h) {
          int64_t k = 0;
          do part(p, n, h, k, std::min(kRow, p.width - k));
          while ((k += kRow) < p.width);
        }
    }
  }

  // Some features of a token's head.
  EAP_INLINE static void part(const Collapse& p, int64_t n, int64_t h, int64_t k, int64_t count) {
    A sums[kRow], gradients[kRow], values[kRow], other[kRow];
    const int64_t token = p.rows ? p.rows[n] : n;
    A* const out = static_cast<A*>(p.out) + n * p.out_stride[0] + h * p.out_stride[1] + k * p.out_stride[2];
    for (int64_t i = 0; i < count; ++i) sums[i] = out[i * p.out_stride[2]];
    for (int64_t m = 0; m < p.points; ++m) {
      const A scale = A(p.scales[m * p.count + n]);
      const A* const g = row<A>(p.gradient, p.gradient.at(m, token, h, k), count, gradients);
      const A* y = row<A>(p.values, p.values.at(m, p.gathered ? n : token, h, k), count, values);
      if (p.constant.data) {
        const A* const constant = row<A>(p.constant, p.constant.at(0, 0, h, k), count, other);
        for (int64_t i = 0; i < count; ++i) values[i] = y[i] - constant[i];
        y = values;
      }
      if (p.gain.data) {
        const A* const gain = row<A>(p.gain, p.gain.at(0, 0, 0, k), count, other);
        for (int64_t i = 0; i < count; ++i) values[i] = y[i] * gain[i];
        y = values;
      }
      for (int64_t i = 0; i < count; ++i) sums[i] += scale * g[i];
      A& c = static_cast<A*>(p.coefficients)[h * p.c_stride[0] + m * p.c_stride[1] + n * p.c_stride[2]];
      c = (k ? c : A(0)) + scale * dot<BYTES>(g, y, count) / A(p.features);
    }
    for (int64_t i = 0; i < count; ++i) out[i * p.out_stride[2]] = sums[i];
  }
};

}  // namespace

int64_t Collapse::tasks() const { return divide_up(count, tokens_per_task); }

void Collapse::run(int64_t task) const { dispatch<Body>(dtype, *this, task); }

}  // namespace eap

// Residual-space rows of nodes that are kept in head space, one tile of tokens x features at a time:
// row(i)[n, d] = sum_k values[i, n, k] * weight[i / per_weight, k, d] - sum_m coefficients[i, m, n] * normalised[m, n, d].
#include <algorithm>

#include "dispatch.h"
#include "product.h"

namespace eap {
namespace {

template <class T, int BYTES> struct Body {
  using A = acc_t<T>;
  static constexpr int64_t width = tile_columns<A, BYTES>;

  EAP_INLINE static void run(const Expand& p, int64_t node) {
    const Nodes& g = *std::find_if(p.groups, p.groups + p.n_groups,
                                   [&](const Nodes& x) { return node < x.first + x.values.size[0]; });
    const int64_t i = node - g.first;
    A* const to = static_cast<A*>(p.out) + node * p.out_stride;
    if (g.weight.data) project(p, g, i, to);
    else rows(p, g, i, to);
    for (int64_t m = 0; m < g.normalised.size[0]; ++m) subtract(p, g, i, m, to);
  }

  EAP_INLINE static const T* at(const View& x, int64_t i, int64_t j, int64_t k) {
    return static_cast<const T*>(x.data) + i * x.stride[0] + j * x.stride[1] + k * x.stride[2];
  }

  EAP_INLINE static void rows(const Expand& p, const Nodes& g, int64_t i, A* to) {
    for (int64_t n = 0; n < p.tokens; ++n) {
      const T* from = at(g.values, i, p.token + n, p.feature);
      for (int64_t d = 0; d < p.features; ++d) to[n * p.features + d] = load(from[d * g.values.stride[2]]);
    }
  }

  EAP_INLINE static void project(const Expand& p, const Nodes& g, int64_t i, A* to) {
    const int64_t inner = g.values.size[2], rows = tile_rows(BYTES);
    A* const a = scratch<A>((p.tokens + width) * inner + rows * width);
    A *const packed = a + p.tokens * inner, *const edge = packed + width * inner;
    for (int64_t n = 0; n < p.tokens; ++n) {
      const T* from = at(g.values, i, p.token + n, 0);
      for (int64_t k = 0; k < inner; ++k) a[n * inner + k] = load(from[k * g.values.stride[2]]);
    }
    std::fill_n(to, p.tokens * p.features, A(0));
    for (int64_t d = 0; d < p.features; d += width) {
      const int64_t columns = std::min(width, p.features - d);
      const T* const weight = at(g.weight, i / g.per_weight, 0, p.feature + d);
      const A* b = packed;
      int64_t ldb = width;
      if constexpr (std::is_same_v<T, A>)
        if (columns == width && g.weight.stride[2] == 1) b = weight, ldb = g.weight.stride[1];
      if (b == packed)
        for (int64_t k = 0; k < inner; ++k)
          for (int64_t j = 0; j < width; ++j)
            packed[k * width + j] = j < columns ? A(load(weight[k * g.weight.stride[1] + j * g.weight.stride[2]])) : A(0);
      for_tiles<BYTES>(p.tokens, [&](int64_t row, int64_t M) EAP_INLINE_LAMBDA {
        const auto kernel = tile_kernel<A, BYTES>(M, kVectors);
        if (columns == width) return kernel(a + row * inner, inner, b, ldb, inner, to + row * p.features + d, p.features, {});
        std::fill_n(edge, M * width, A(0));
        kernel(a + row * inner, inner, b, ldb, inner, edge, width, {});
        for (int64_t r = 0; r < M; ++r) std::copy_n(edge + r * width, columns, to + (row + r) * p.features + d);
      });
    }
  }

  EAP_INLINE static void subtract(const Expand& p, const Nodes& g, int64_t i, int64_t m, A* to) {
    for (int64_t n = 0; n < p.tokens; ++n) {
      const A c = load(*at(g.coefficients, i, m, p.token + n));
      const T* const x = at(g.normalised, m, p.token + n, p.feature);
      A* __restrict row = to + n * p.features;
      if (g.normalised.stride[2] == 1)
        for (int64_t d = 0; d < p.features; ++d) row[d] -= c * load(x[d]);
      else
        for (int64_t d = 0; d < p.features; ++d) row[d] -= c * load(x[d * g.normalised.stride[2]]);
    }
  }
};

}  // namespace

void Expand::run(int64_t node) const { dispatch<Body>(dtype, *this, node); }

}  // namespace eap
